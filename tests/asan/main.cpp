// Runs the CPU kernels over small shapes under the sanitizers this program is built with.
#include "cases.h"

int main() {
  biasloss::run_depthwise();
  biasloss::run_expansion();
}
