#include "simulated_device.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace cudasim {

namespace {

unsigned setting(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? unsigned(std::strtoul(text, nullptr, 10)) : otherwise;
}

}  // namespace

Device::Device() : multiprocessors(int(setting("BIASLOSS_SIMULATED_MULTIPROCESSORS", 3))) {
  schedule.seed = setting("BIASLOSS_SIMULATED_SEED", 0);
  schedule.resident_blocks = setting("BIASLOSS_SIMULATED_RESIDENT_BLOCKS", 2);
}

Device& device() {
  static Device instance;
  return instance;
}

cudaError_t Device::refusal(const void* kernel, const Launch& launch) const {
  const dim3& grid = launch.grid;
  const bool blocks = grid.x >= 1 && grid.x <= kMostBlocksX && grid.y >= 1 && grid.y <= kMostBlocksYZ && grid.z >= 1 &&
                      grid.z <= kMostBlocksYZ;
  if (!blocks || launch.threads < 1 || launch.threads > kMostThreads) return cudaErrorInvalidConfiguration;
  const auto asked = dynamic_shared_bytes.find(kernel);
  return launch.shared_bytes <= (asked == dynamic_shared_bytes.end() ? kSharedBytes : asked->second)
             ? cudaSuccess
             : cudaErrorInvalidValue;
}

Schedule Device::next_schedule(const void* kernel) {
  Schedule next = schedule;
  next.most_shared_bytes = dynamic_shared_bytes.count(kernel) != 0 ? kSharedBytesOptIn : kSharedBytes;
  if (schedule.seed != 0) ++schedule.seed;
  return next;
}

}  // namespace cudasim

namespace {

cudaError_t refused_by_capture() {
  return cudasim::device().capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "no error";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(cudasim::kSharedBytes);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(cudasim::kSharedBytesOptIn);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = int(cudasim::kSharedBytesOptIn) + 1024;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cudasim::device().multiprocessors;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudasim::device().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (refused_by_capture() != cudaSuccess) return refused_by_capture();
  if (value < 0) return cudaErrorInvalidValue;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (size_t(value) > cudasim::kSharedBytesOptIn) return cudaErrorInvalidValue;
  cudasim::device().dynamic_shared_bytes[kernel] = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return refused_by_capture(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return refused_by_capture(); }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (refused_by_capture() != cudaSuccess) return refused_by_capture();
  *pointer = std::malloc(bytes);
  return *pointer != nullptr || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void* pointer) {
  if (refused_by_capture() != cudaSuccess) return refused_by_capture();
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

// How tests drive the device, through ctypes: tests/cudasim/simulated_gpu.py.
#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Returns what it was, -1 for a setting that does not exist.
EXPORTED long biasloss_simulator_set(const char* name, long value) {
  cudasim::Device& device = cudasim::device();
  const std::string setting(name);
  if (setting == "multiprocessors") return std::exchange(device.multiprocessors, int(value));
  if (setting == "seed") return std::exchange(device.schedule.seed, unsigned(value));
  if (setting == "resident_blocks") return std::exchange(device.schedule.resident_blocks, unsigned(value));
  if (setting == "capturing") return std::exchange(device.capturing, value != 0);
  return -1;
}

EXPORTED void biasloss_simulator_skip_barrier(const char* site) { cudasim::device().schedule.skipped_barrier = site; }

// Barriers met since the last call, one a line.
EXPORTED const char* biasloss_simulator_take_barriers() {
  static std::string lines;
  lines.clear();
  for (const std::string& site : cudasim::scheduler().take_barriers_met()) lines += site + "\n";
  return lines.c_str();
}

// Launches since the last call, one a line: blocks in three dimensions, threads, dynamic shared bytes, captured or not.
EXPORTED const char* biasloss_simulator_take_launches() {
  static std::string lines;
  lines.clear();
  for (const cudasim::Launch& launch : cudasim::device().launches) {
    for (const size_t number : {size_t(launch.grid.x), size_t(launch.grid.y), size_t(launch.grid.z),
                                size_t(launch.threads), launch.shared_bytes, size_t(launch.captured)})
      lines += std::to_string(number) + " ";
    lines += "\n";
  }
  cudasim::device().launches.clear();
  return lines.c_str();
}
}
