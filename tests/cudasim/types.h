// CUDA's built-in types, so that the simulator needs no CUDA headers. 16-bit floats are stored and converted; the
// kernels compute in float32.
#pragma once

#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cudasim {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Rounds a float32 to nearest, ties to even.
uint16_t float16_of(float x);
uint16_t bfloat16_of(float x);
float float_of_float16(uint16_t bits);

}  // namespace cudasim

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(cudasim::float16_of(x)) {}
  explicit operator float() const { return cudasim::float_of_float16(bits); }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : bits(cudasim::bfloat16_of(x)) {}
  explicit operator float() const { return cudasim::float_of(uint32_t(bits) << 16); }
};
