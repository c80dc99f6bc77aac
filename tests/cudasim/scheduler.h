// Runs a grid on the CPU: every CUDA thread is a fiber, several blocks are resident at a time, and a seed decides who
// runs next. Everything happens in one operating system thread, so that a seed names one schedule and a failure can be
// repeated.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "types.h"

namespace cudasim {

// What the simulator found wrong with a kernel.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Schedule {
  unsigned seed = 0;             // 0: threads and blocks in order
  unsigned resident_blocks = 2;  // blocks that run side by side
  std::string skipped_barrier;   // "file.cuh:12": the __syncthreads there does nothing, as if it had been forgotten
  size_t most_shared_bytes = size_t(48) << 10;  // static and dynamic, of a block
};

// Where something happens in the source, "file.cuh:12".
std::string site(const char* file, int line);

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;
  uint3 thread_index{};
  bool done = false;
  bool waiting = false;
  std::string waits_at;      // for the report of a deadlock
  uint64_t block_epoch = 0;  // block-wide barriers passed
  uint64_t warp_epoch = 0;   // __syncwarp of the whole warp passed
  unsigned lane() const { return index % 32; }
};

// Threads that wait for each other.
struct Rendezvous {
  std::vector<Thread*> arrived;
  uint64_t generation = 0;
};

struct Warp {
  // One per lowest lane of the mask, so that disjoint parts of a warp do not meet.
  struct Group {
    Rendezvous rendezvous;
    unsigned mask = 0;
    // Two generations: the slowest lane may still read one while the fastest fills the other.
    alignas(16) unsigned char slot[2][32][16];
  };
  Group group[32];
};

struct SharedAccess {
  const Thread* thread;
  uint64_t block_epoch;
  uint64_t warp_epoch;
};

// One shared array of one block, and what has happened to each of its elements.
struct SharedStorage {
  struct Element {
    bool written = false;
    SharedAccess last_write{};
    std::vector<SharedAccess> reads;  // since then, of the present epoch
  };
  std::string name;
  std::vector<unsigned char> bytes;
  std::vector<Element> elements;
};

struct Block {
  uint3 block_index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Rendezvous barrier;
  unsigned live = 0;
  std::map<std::pair<const char*, int>, SharedStorage> shared;
  size_t shared_bytes = 0;
};

class Scheduler {
 public:
  // Runs every block of a grid. Throws a Violation.
  void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const Schedule& schedule, std::function<void()> body);

  Thread& current() { return *current_; }
  dim3 grid() const { return grid_; }
  dim3 block() const { return block_size_; }
  size_t dynamic_shared_bytes() const { return dynamic_shared_bytes_; }
  size_t most_shared_bytes() const { return schedule_.most_shared_bytes; }
  // Block-wide barriers met since the last call.
  std::set<std::string> take_barriers_met() { return std::exchange(barriers_met_, {}); }

  void barrier(const char* file, int line);
  // Lets others run first, if the schedule says so.
  void yield();
  // Returns the slots that the lanes of the mask have filled with their values, 16 bytes each.
  const unsigned char* exchange(unsigned mask, const void* value, size_t size, const char* what);

  [[noreturn]] void fail(const std::string& what);

 private:
  static void enter_thread();
  void admit_blocks();
  void make_block(uint64_t linear);
  void run_next();
  void wait_in(Rendezvous& rendezvous, const std::string& where);
  void release(Rendezvous& rendezvous);
  void release_barrier(Block& block);
  void finish_thread();
  void leave_to_main();
  std::string deadlock_report() const;

  Schedule schedule_;
  dim3 grid_, block_size_;
  size_t dynamic_shared_bytes_ = 0;
  std::function<void()> body_;
  std::mt19937 random_;
  std::vector<uint64_t> pending_;  // blocks to start, the next one last
  std::map<uint64_t, Block> resident_;
  std::vector<Stack> stacks_;
  std::vector<size_t> free_stacks_;
  std::map<const Thread*, size_t> stack_of_;
  std::vector<Thread*> runnable_;
  std::set<std::string> barriers_met_;
  Thread* current_ = nullptr;
  Fiber main_;
  std::string violation_;
};

Scheduler& scheduler();

}  // namespace cudasim
