// Runs the CPU kernels over small shapes under the sanitizers this program is built with.
#include "cases.h"

int main() {
  biasloss::run_columns();
  biasloss::run_depthwise();
  biasloss::run_expansion();
  biasloss::run_plain_depthwise();
  biasloss::run_pointwise();
  biasloss::run_quantized();
  biasloss::run_rows();
  biasloss::run_small_matrices();
}
