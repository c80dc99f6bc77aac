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

// Instruction sets of the products of bytes; files named *_int8.cpp are compiled once for each.
enum class Int8Isa { none, avx2, avx512vnni };

// As best_isa(), but that a build for development has all of these that its machine can run.
Int8Isa best_int8_isa();
const char* int8_isa_name(Int8Isa isa);  // for people; empty where there is none

// Picks among the builds of one table of functions; null stands for one that is not in this build.
template <class Table>
const Table& for_this_cpu(const Table* baseline, const Table* avx2, const Table* avx512) {
  switch (best_isa()) {
    case Isa::avx512:
      return *avx512;
    case Isa::avx2:
      return *avx2;
    default:
      return *baseline;
  }
}

#if defined(BIASLOSS_WITH_AVX2)
#define BIASLOSS_AVX2_TABLE(table) &avx2::table
#else
#define BIASLOSS_AVX2_TABLE(table) nullptr
#endif
#if defined(BIASLOSS_WITH_AVX512)
#define BIASLOSS_AVX512_TABLE(table) &avx512::table
#else
#define BIASLOSS_AVX512_TABLE(table) nullptr
#endif

// Declares the table that each build of a *_simd.cpp file defines, and the function that returns the one for this CPU.
#define BIASLOSS_TABLE_FOR_THIS_CPU(Table, table, function)                                                 \
  namespace baseline {                                                                                      \
  extern const Table table;                                                                                 \
  }                                                                                                         \
  namespace avx2 {                                                                                          \
  extern const Table table;                                                                                 \
  }                                                                                                         \
  namespace avx512 {                                                                                        \
  extern const Table table;                                                                                 \
  }                                                                                                         \
  inline const Table& function() {                                                                          \
    return for_this_cpu<Table>(&baseline::table, BIASLOSS_AVX2_TABLE(table), BIASLOSS_AVX512_TABLE(table)); \
  }

}  // namespace biasloss
