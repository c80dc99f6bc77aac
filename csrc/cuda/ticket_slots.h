// Which of the ticket counters in last_block.cuh a launch uses. Launches that may run at the same time must not share
// one.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace biasloss {

// Eager launches have one slot a device and stream, whose launches run one after another. A launch under stream capture
// gets a slot of its own, since the graph may later be replayed on any stream, beside any other graph: launches of one
// graph are ordered by the graph, replays of one executable graph by the driver. Both halves wrap: two streams (two
// captured launches) would share a counter if they were 2048 apart, and could then disturb each other if they also ran
// at the same time.
inline unsigned ticket_slot(int device, cudaStream_t stream) {
  constexpr unsigned kSlotsOfStreams = 2048, kSlotsOfGraphs = 2048;
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, unsigned> slot_of_stream;
  static unsigned captured_launches = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  const std::lock_guard<std::mutex> lock(mutex);
  if (status != cudaStreamCaptureStatusNone) return kSlotsOfStreams + captured_launches++ % kSlotsOfGraphs;
  const unsigned next = static_cast<unsigned>(slot_of_stream.size()) % kSlotsOfStreams;
  return slot_of_stream.try_emplace({device, stream}, next).first->second;
}

}  // namespace biasloss
