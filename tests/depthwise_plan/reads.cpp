// How often the depthwise kernels read their maps, by the plan: from every line "samples channels size kernel stride"
// of the input, a line for the forward and one for the backward pass: values of the staged map that are read, and cells
// that are written to shared memory, over the values of the map; blocks, and how many of them run at once; bytes of
// shared memory.
#include <algorithm>
#include <cstdio>
#include <iostream>

#include "depthwise/cuda_plan.h"

namespace {

using namespace biasloss;

constexpr int kMultiprocessors = 132;

struct Shape {
  int64_t samples, channels, size;
};

int64_t overlap(int64_t first, int64_t count, int64_t size) {
  return std::max<int64_t>(std::min(first + count, size) - std::max<int64_t>(first, 0), 0);
}

template <class Tiling>
void report(const char* direction, const Shape& shape, int64_t computed, int64_t staged) {
  using Window = typename Tiling::Window;
  const DepthwisePlan plan =
      plan_depthwise<Tiling>(shape.samples, shape.channels, computed, computed, staged, staged, kMultiprocessors);
  const TileGrid& grid = plan.grid;
  const int64_t rows = Window::extent(int(grid.tile_rows)), columns = Window::extent(int(grid.tile_columns));
  int64_t read = 0, written = 0;
  for (unsigned tile = 0; tile < grid.tiles; ++tile) {
    const int row = int(tile % grid.tiles_down * grid.tile_rows);
    const int column = int(tile / grid.tiles_down % grid.tiles_across * grid.tile_columns);
    // The block has the rest of the window from the tile before.
    const bool continues = row != 0 && tile % grid.tiles_of_block != 0;
    const int64_t count = continues ? Window::scaled(int(grid.tile_rows)) : rows;
    const int64_t first = Window::scaled(row) - Window::kHalo + rows - count;
    read += overlap(first, count, staged) * overlap(Window::scaled(column) - Window::kHalo, columns, staged);
    written += (grid.tiles_down == 1 ? staged : count) * (grid.tiles_across == 1 ? staged : columns);
  }
  const double map = double(shape.samples) * double(staged) * double(staged);
  std::printf("%s %ux%ux%u %.3f %.3f %u %u %zu\n", direction, grid.slab, grid.tile_rows, grid.tile_columns,
              double(read) / map, double(written) / map, plan.slabs * plan.blocks_of_slab,
              Tiling::kBlocks * kMultiprocessors, plan.shared_bytes);
}

template <int kernel, int stride>
void report_both(const Shape& shape) {
  const int64_t y = (shape.size + stride - 1) / stride;
  report<ForwardTiling<__nv_bfloat16, float, kernel, stride>>("forward", shape, y, shape.size);
  report<BackwardTiling<__nv_bfloat16, float, kernel, stride>>("backward", shape, shape.size, y);
}

}  // namespace

int main() {
  Shape shape;
  int kernel, stride;
  while (std::cin >> shape.samples >> shape.channels >> shape.size >> kernel >> stride) {
    if (kernel == 3 && stride == 1) report_both<3, 1>(shape);
    if (kernel == 3 && stride == 2) report_both<3, 2>(shape);
    if (kernel == 5 && stride == 1) report_both<5, 1>(shape);
    if (kernel == 5 && stride == 2) report_both<5, 2>(shape);
    if (kernel == 7 && stride == 1) report_both<7, 1>(shape);
    if (kernel == 7 && stride == 2) report_both<7, 2>(shape);
  }
}
