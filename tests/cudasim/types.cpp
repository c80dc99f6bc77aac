#include "types.h"

#include <cmath>

namespace cudasim {

uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t float16_of(float x) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return uint16_t(sign | 0x7e00);
  if (magnitude == 0.0f) return sign;
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
  // In units of the last place of its binade, which nearbyint rounds as wanted; the carry into the next one is right
  // too.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = exponent < -13 ? -13 : exponent;
  const uint16_t units = uint16_t(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return uint16_t(sign | ((exponent + 13) * 1024 + units));
}

float float_of_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
  return sign * std::ldexp(float(1024 + mantissa), exponent - 25);
}

}  // namespace cudasim
