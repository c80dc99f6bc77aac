#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace biasloss {
namespace {

// The best that the environment allows.
Isa limit() {
  const char* name = std::getenv("BIASLOSS_CPU_ISA");
  if (name == nullptr || *name == '\0') return Isa::avx512;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(name, isa_name(isa)) == 0) return isa;
  throw std::invalid_argument("BIASLOSS_CPU_ISA must be baseline, avx2 or avx512, got '" + std::string(name) + "'");
}

// The best that the environment and the CPU allow, whatever kernels were built.
Isa usable() {
  const Isa most = limit();
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (most >= Isa::avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (most >= Isa::avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa detect() {
  [[maybe_unused]] const Isa most = usable();
#if defined(BIASLOSS_WITH_AVX512)
  if (most >= Isa::avx512) return Isa::avx512;
#endif
#if defined(BIASLOSS_WITH_AVX2)
  if (most >= Isa::avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Int8Isa detect_int8() {
  [[maybe_unused]] const Isa most = usable();
#if defined(BIASLOSS_WITH_INT8_AVX512VNNI)
  if (most >= Isa::avx512 && __builtin_cpu_supports("avx512vnni")) return Int8Isa::avx512vnni;
#endif
#if defined(BIASLOSS_WITH_INT8_AVX2)
  if (most >= Isa::avx2) return Int8Isa::avx2;
#endif
  return Int8Isa::none;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Int8Isa best_int8_isa() {
  static const Int8Isa isa = detect_int8();
  return isa;
}

const char* int8_isa_name(Int8Isa isa) {
  switch (isa) {
    case Int8Isa::avx512vnni:
      return "AVX-512 VNNI";
    case Int8Isa::avx2:
      return "AVX2";
    default:
      return "";
  }
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace biasloss
