#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace biasloss {
namespace {

const char* limit_by_environment() {
  const char* limit = std::getenv("BIASLOSS_CPU_ISA");
  if (limit == nullptr || *limit == '\0') return nullptr;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(limit, isa_name(isa)) == 0) return limit;
  throw std::invalid_argument("BIASLOSS_CPU_ISA must be baseline, avx2 or avx512, got '" + std::string(limit) + "'");
}

Isa detect() {
  [[maybe_unused]] const char* limit = limit_by_environment();
#if defined(BIASLOSS_WITH_AVX2) || defined(BIASLOSS_WITH_AVX512)
  __builtin_cpu_init();
  [[maybe_unused]] const bool limited_to_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  if (limit != nullptr && std::strcmp(limit, "baseline") == 0) return Isa::baseline;
#endif
#if defined(BIASLOSS_WITH_AVX512)
  if (!limited_to_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
#endif
#if defined(BIASLOSS_WITH_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

bool has_int8() {
#if defined(BIASLOSS_WITH_AVX512)
  static const bool has = best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
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
