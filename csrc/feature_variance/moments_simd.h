// The moments of a run of activations, in each instruction set.
#pragma once

#include <cstdint>

#include "../math/moments.h"
#include "../simd/isa.h"

namespace biasloss {

struct Float16;
struct BFloat16;

struct MomentsTable {
  Moments<double> (*of_float32)(const float*, int64_t);
  Moments<double> (*of_float64)(const double*, int64_t);
  Moments<double> (*of_float16)(const Float16*, int64_t);
  Moments<double> (*of_bfloat16)(const BFloat16*, int64_t);
};

namespace baseline {
extern const MomentsTable moments_table;
}
namespace avx2 {
extern const MomentsTable moments_table;
}
namespace avx512 {
extern const MomentsTable moments_table;
}

inline const MomentsTable& moments_table() {
#if defined(BIASLOSS_X86_VARIANTS)
  return for_this_cpu(baseline::moments_table, avx2::moments_table, avx512::moments_table);
#else
  return baseline::moments_table;
#endif
}

}  // namespace biasloss
