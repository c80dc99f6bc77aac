#include "team.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace biasloss {
namespace {

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Long enough for the parts of a program that run on one thread, a few hundred microseconds; after that a thread
// sleeps, and leaves its core to whoever was preempted there.
constexpr int kSpins = 8192;

thread_local int64_t size_of_session = 0;

// CPUs that a control group may use (version 2), or none where there is no limit.
int64_t cpu_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return INT64_MAX;  // "max" is no number
  return std::max<int64_t>(1, static_cast<int64_t>(quota / period + 0.5));
}

// Of those that this thread may run on and pay for.
int64_t available_cpus() {
  static const int64_t quota = cpu_quota();
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) return std::min<int64_t>(quota, CPU_COUNT(&cpus));
#endif
  return std::min<int64_t>(quota, std::max(1u, std::thread::hardware_concurrency()));
}

// One region is published at a time, under a number of its own. Each thread has a ticket of its own for an equal part
// of the shares, one behind the other, so that it finds in its caches what it wrote in the region before; who is done
// takes what others have left. A thread that comes late finds either no share left or another number in the tickets,
// and takes nothing.
class Team {
 public:
  bool begin(int64_t threads) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    threads = std::min(threads, kMostThreads);
    for (; workers_ < threads - 1; ++workers_) std::thread(&Team::work, this, workers_).detach();
    members_.store(threads - 1, std::memory_order_relaxed);
    parts_.store(threads, std::memory_order_relaxed);
    publish(0, nullptr, nullptr);  // wakes the members early
    return true;
  }

  void end() {
    members_.store(0, std::memory_order_relaxed);
    busy_.clear(std::memory_order_release);
  }

  void run(int64_t shares, void (*call)(const void*, int64_t), const void* body) {
    publish(shares, call, body);
    take_shares(number_.load(std::memory_order_relaxed), 0);
    for (int spins = 0;; ++spins) {
      const uint32_t finished = finished_.load(std::memory_order_acquire);
      if (finished == shares) break;
      if (spins < kSpins)
        pause_briefly();
      else
        finished_.wait(finished, std::memory_order_acquire);
    }
    if (failed_.exchange(false, std::memory_order_acquire)) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int64_t kMostThreads = 256;

  // The number of a region, and of a part of its shares the next one and the end: whoever replaces a ticket on which
  // shares are left knows that its region is not finished, so that `call_` and `body_` were those of it.
  struct Ticket {
    uint32_t number;
    uint16_t next, end;
  };
  struct alignas(64) OfPart {
    std::atomic<Ticket> ticket{};
  };

  void publish(int64_t shares, void (*call)(const void*, int64_t), const void* body) {
    call_.store(call, std::memory_order_relaxed);
    body_.store(body, std::memory_order_relaxed);
    shares_.store(static_cast<uint32_t>(shares), std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    const uint32_t number = number_.load(std::memory_order_relaxed) + 1;
    const int64_t parts = parts_.load(std::memory_order_relaxed);
    for (int64_t part = 0; part < parts; ++part) {
      const auto begin = static_cast<uint16_t>(shares * part / parts);
      const auto end = static_cast<uint16_t>(shares * (part + 1) / parts);
      parts_of_region_[part].ticket.store({number, begin, end}, std::memory_order_release);
    }
    number_.store(number, std::memory_order_release);
    number_.notify_all();
  }

  // Those of part `own` first.
  void take_shares(uint32_t number, int64_t own) {
    const int64_t parts = parts_.load(std::memory_order_relaxed);
    for (int64_t i = 0; i < parts; ++i) take_shares_of(number, parts_of_region_[(own + i) % parts].ticket);
  }

  void take_shares_of(uint32_t number, std::atomic<Ticket>& part) {
    Ticket ticket = part.load(std::memory_order_acquire);
    while (ticket.number == number && ticket.next < ticket.end) {
      const auto call = call_.load(std::memory_order_relaxed);
      const void* const body = body_.load(std::memory_order_relaxed);
      const uint32_t shares = shares_.load(std::memory_order_relaxed);
      const Ticket left = {number, static_cast<uint16_t>(ticket.next + 1), ticket.end};
      if (!part.compare_exchange_weak(ticket, left, std::memory_order_acq_rel)) continue;
      run_share(call, body, ticket.next);
      if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == shares) finished_.notify_one();
      ticket = part.load(std::memory_order_acquire);
    }
  }

  void run_share(void (*call)(const void*, int64_t), const void* body, int64_t share) {
    const int64_t size = std::exchange(size_of_session, 1);
    try {
      call(body, share);
    } catch (...) {
      const std::scoped_lock lock(failure_mutex_);
      failure_ = std::current_exception();
      failed_.store(true, std::memory_order_release);
    }
    size_of_session = size;
  }

  void work(int64_t index) {
    for (uint32_t seen = 0;;) {
      seen = next_number(seen, index);
      if (index < members_.load(std::memory_order_relaxed)) take_shares(seen, index + 1);
    }
  }

  uint32_t next_number(uint32_t seen, int64_t index) {
    for (int spins = 0; spins < kSpins && index < members_.load(std::memory_order_relaxed); ++spins) {
      const uint32_t number = number_.load(std::memory_order_acquire);
      if (number != seen) return number;
      pause_briefly();
    }
    number_.wait(seen, std::memory_order_acquire);
    return number_.load(std::memory_order_acquire);
  }

  const std::unique_ptr<OfPart[]> parts_of_region_ = std::make_unique<OfPart[]>(kMostThreads);
  alignas(64) std::atomic<uint32_t> finished_{0};  // shares of it
  alignas(64) std::atomic<uint32_t> number_{0};    // what threads without work watch
  std::atomic<int64_t> members_{0};                // workers of the session
  std::atomic<int64_t> parts_{1};                  // that the shares of a region are cut into
  std::atomic<uint32_t> shares_{0};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
  std::mutex failure_mutex_;
  std::atomic_flag busy_;
  int64_t workers_ = 0;
};

// Never destroyed: its threads may be asleep in it when the process ends. A child of fork() has none of them, and
// begins with a new team.
std::atomic<Team*> team{nullptr};

Team& current_team() {
#if defined(__linux__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { team.store(nullptr); });
  (void)registered;
#endif
  Team* found = team.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  auto* made = new Team();
  if (team.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *found;
}

}  // namespace

TeamSession::TeamSession(int64_t threads) {
  const int64_t size = std::min(threads, available_cpus());
  has_team_ = size > 1 && size_of_session == 0 && current_team().begin(size);
  if (has_team_) size_of_session = size;
}

TeamSession::~TeamSession() {
  if (!has_team_) return;
  size_of_session = 0;
  current_team().end();
}

int64_t team_size() { return size_of_session; }

void team_shares(int64_t shares, void (*call)(const void* body, int64_t share), const void* body) {
  current_team().run(shares, call, body);
}

}  // namespace biasloss
