// One function for each family of CPU kernels, each in a file of its own.
#pragma once

namespace biasloss {

void run_depthwise();
void run_expansion();

}  // namespace biasloss
