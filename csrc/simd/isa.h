// Instruction sets of the CPU kernels. Files named *_simd.cpp are compiled once for each of them, into a namespace of
// its name; what they share lies in that namespace too, so that no function compiled for a newer CPU can be linked into
// the path of an older one. They include no header with inline functions of its own (torch, most of std).
#pragma once

#if !defined(BIASLOSS_ISA)
#define BIASLOSS_ISA baseline
#endif

namespace biasloss {

enum class Isa { baseline, avx2, avx512 };

// The best that both the build and this CPU have. The environment variable BIASLOSS_CPU_ISA lowers it.
Isa best_isa();
const char* isa_name(Isa isa);

// Picks among the builds of one table of functions.
template <class Table>
const Table& for_this_cpu(const Table& baseline, [[maybe_unused]] const Table& avx2,
                          [[maybe_unused]] const Table& avx512) {
  switch (best_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace biasloss
