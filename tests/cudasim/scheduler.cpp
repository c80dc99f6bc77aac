#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace cudasim {

std::string site(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
}

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

namespace {

std::string name_of(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

}  // namespace

void Scheduler::fail(const std::string& what) {
  throw Violation(what + " [block " + name_of(current_->block->block_index) + ", thread " +
                  name_of(current_->thread_index) + "]");
}

void Scheduler::run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const Schedule& schedule,
                    std::function<void()> body) {
  if (uint64_t(block.x) * block.y * block.z > 1024) throw Violation("a block has at most 1024 threads");
  schedule_ = schedule;
  grid_ = grid;
  block_size_ = block;
  dynamic_shared_bytes_ = dynamic_shared_bytes;
  body_ = std::move(body);
  random_.seed(schedule.seed);
  violation_.clear();
  resident_.clear();
  runnable_.clear();
  stack_of_.clear();
  free_stacks_.resize(stacks_.size());
  std::iota(free_stacks_.begin(), free_stacks_.end(), size_t(0));
  pending_.resize(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(pending_.rbegin(), pending_.rend(), uint64_t(0));
  if (schedule.seed != 0) std::shuffle(pending_.begin(), pending_.end(), random_);

  for (admit_blocks(); !resident_.empty() && violation_.empty(); admit_blocks()) {
    if (runnable_.empty()) {
      violation_ = deadlock_report();
      break;
    }
    run_next();
  }
  resident_.clear();
  runnable_.clear();
  current_ = nullptr;
  if (!violation_.empty()) throw Violation(violation_);
}

void Scheduler::admit_blocks() {
  for (auto it = resident_.begin(); it != resident_.end();) {
    if (it->second.live != 0) {
      ++it;
      continue;
    }
    for (const Thread& thread : it->second.threads) {
      free_stacks_.push_back(stack_of_.at(&thread));
      stack_of_.erase(&thread);
    }
    it = resident_.erase(it);
  }
  while (resident_.size() < schedule_.resident_blocks && !pending_.empty()) {
    make_block(pending_.back());
    pending_.pop_back();
  }
}

void Scheduler::make_block(uint64_t linear) {
  Block& block = resident_[linear];
  const unsigned count = block_size_.x * block_size_.y * block_size_.z;
  block.block_index = {unsigned(linear % grid_.x), unsigned(linear / grid_.x % grid_.y),
                       unsigned(linear / (uint64_t(grid_.x) * grid_.y))};
  block.live = count;
  block.threads.resize(count);
  block.warps.resize((count + 31) / 32);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    thread.thread_index = {i % block_size_.x, i / block_size_.x % block_size_.y, i / (block_size_.x * block_size_.y)};
    if (free_stacks_.empty()) {
      stacks_.emplace_back();
      free_stacks_.push_back(stacks_.size() - 1);
    }
    stack_of_[&thread] = free_stacks_.back();
    prepare(thread.fiber, stacks_[free_stacks_.back()], &Scheduler::enter_thread);
    free_stacks_.pop_back();
    runnable_.push_back(&thread);
  }
}

// Called in the main flow: one thread runs until it waits, yields or ends.
void Scheduler::run_next() {
  // In order means the most recent first: a block runs to its barrier before the next one starts.
  const size_t chosen = schedule_.seed != 0 ? random_() % runnable_.size() : runnable_.size() - 1;
  std::swap(runnable_[chosen], runnable_.back());
  current_ = runnable_.back();
  runnable_.pop_back();
  switch_fiber(main_, current_->fiber);
}

void Scheduler::leave_to_main() { switch_fiber(current_->fiber, main_); }

void Scheduler::enter_thread() {
  Scheduler& s = scheduler();
  arrive_in_fresh_fiber(s.main_);
  try {
    s.body_();
  } catch (const Violation& violation) {
    s.violation_ = violation.what();
  }
  s.finish_thread();
  s.leave_to_main();
  __builtin_unreachable();
}

void Scheduler::finish_thread() {
  Block& block = *current_->block;
  current_->done = true;
  --block.live;
  // A barrier waits for those who have not left.
  if (violation_.empty() && !block.barrier.arrived.empty() && block.barrier.arrived.size() == block.live) {
    try {
      release_barrier(block);
    } catch (const Violation& violation) {
      violation_ = violation.what();
    }
  }
}

void Scheduler::wait_in(Rendezvous& rendezvous, const std::string& where) {
  Thread& self = *current_;
  self.waiting = true;
  self.waits_at = where;
  rendezvous.arrived.push_back(&self);
  leave_to_main();
}

void Scheduler::release(Rendezvous& rendezvous) {
  ++rendezvous.generation;
  for (Thread* thread : rendezvous.arrived) {
    thread->waiting = false;
    runnable_.push_back(thread);
  }
  rendezvous.arrived.clear();
}

void Scheduler::release_barrier(Block& block) {
  const std::string& where = block.barrier.arrived.front()->waits_at;
  for (Thread* thread : block.barrier.arrived) {
    if (thread->waits_at != where)
      fail("divergent barrier: some threads wait in " + where + ", others in " + thread->waits_at);
    ++thread->block_epoch;
  }
  release(block.barrier);
}

void Scheduler::barrier(const char* file, int line) {
  const std::string where = site(file, line);
  barriers_met_.insert(where);
  if (where == schedule_.skipped_barrier) return yield();
  Block& block = *current_->block;
  if (block.barrier.arrived.size() + 1 < block.live) return wait_in(block.barrier, "__syncthreads " + where);
  Thread& self = *current_;
  self.waits_at = "__syncthreads " + where;
  block.barrier.arrived.push_back(&self);
  release_barrier(block);
  leave_to_main();
}

void Scheduler::yield() {
  if (schedule_.seed == 0) return;
  runnable_.push_back(current_);
  leave_to_main();
}

const unsigned char* Scheduler::exchange(unsigned mask, const void* value, size_t size, const char* what) {
  Thread& self = *current_;
  if ((mask >> self.lane() & 1) == 0) fail(std::string(what) + ": the calling lane is not in its own mask");
  Block& block = *self.block;
  const unsigned first = self.index - self.lane();
  unsigned lanes = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    ++lanes;
    if (first + i >= block.threads.size() || block.threads[first + i].done)
      fail(std::string(what) + ": lane " + std::to_string(i) + " of the mask has left or never existed");
  }
  Warp::Group& group = block.warps[self.index / 32].group[__builtin_ctz(mask)];
  Rendezvous& rendezvous = group.rendezvous;
  if (!rendezvous.arrived.empty() && (group.mask != mask || rendezvous.arrived.front()->waits_at != what))
    fail(std::string(what) + " meets " + rendezvous.arrived.front()->waits_at + " of another mask or kind");
  group.mask = mask;
  unsigned char (&slots)[32][16] = group.slot[rendezvous.generation % 2];
  std::memcpy(slots[self.lane()], value, size);
  if (rendezvous.arrived.size() + 1 < lanes)
    wait_in(rendezvous, what);
  else
    release(rendezvous);
  return slots[0];
}

std::string Scheduler::deadlock_report() const {
  std::map<std::string, std::string> waiting;
  for (const auto& [linear, block] : resident_)
    for (const Thread& thread : block.threads)
      if (thread.waiting)
        waiting["block " + name_of(block.block_index) + " in " + thread.waits_at] += " " + std::to_string(thread.index);
  std::string report = "deadlock:";
  for (const auto& [where, threads] : waiting) report += "\n  " + where + " wait threads" + threads;
  return report;
}

}  // namespace cudasim
