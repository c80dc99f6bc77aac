// One function for each family of CPU kernels, each in a file of its own.
#pragma once

namespace biasloss {

void run_columns();
void run_depthwise();
void run_expansion();
void run_plain_depthwise();
void run_pointwise();
void run_quantized();
void run_rows();
void run_small_matrices();

}  // namespace biasloss
