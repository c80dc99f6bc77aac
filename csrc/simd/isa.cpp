#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace biasloss {
namespace {

Isa detect() {
#if defined(BIASLOSS_X86_VARIANTS)
  const char* limit = std::getenv("BIASLOSS_CPU_ISA");
  const auto allowed = [limit](const char* name) { return limit == nullptr || std::strcmp(limit, name) == 0; };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed("avx512")) return Isa::avx512;
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
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
