#include "../depthwise/backward.h"

#include <memory>
#include <tuple>

#include "expanded_rows.h"
#include "ops.h"

namespace biasloss {
namespace {

// Rows of du are gathered until they make a product worth its while, then leave as grad_x and grad_expand.
template <class T, class Scalar>
class ReducedRows {
 public:
  ReducedRows(const Expansion<T, Scalar>& e, const Scalar* x_mean, Scalar* grad_x, Scratch& scratch, int64_t du_stride)
      : e_(&e),
        x_mean_(x_mean),
        grad_x_(grad_x),
        stride_(du_stride),
        narrow_stride_(buffer_stride<Scalar>(e.in.channels)) {
    const int64_t positions = e.rows_at_once() * e.in.width;
    du_ = scratch.template take<Scalar>(positions * stride_);
    x_ = scratch.template take<Scalar>(positions * narrow_stride_);
    if (through_buffer()) sum_ = scratch.template take<Scalar>(positions * narrow_stride_);
  }

  // Whether grad_x of these rows has a sum over other channels already, and grad_expand one over other rows.
  struct Before {
    bool grad_x, grad_expand;
  };
  // From `row` on, one after the other.
  void begin(int64_t row, int64_t channels, const Scalar* scaled_weight, Scalar* grad_expand, Before before) {
    first_ = row, count_ = 0, channels_ = channels, weight_ = scaled_weight;
    grad_expand_ = grad_expand, before_ = before;
  }
  MapRow<Scalar> next() const { return {du_ + count_ * e_->in.width * stride_, stride_}; }
  void keep() {
    if (++count_ == e_->rows_at_once()) flush();
  }
  void flush() {
    const int64_t positions = count_ * e_->in.width, narrow = e_->in.channels;
    if (positions == 0) return;
    Upcoming nothing = {};
    e_->product.widen(e_->x_at(first_), positions, narrow, x_mean_, x_, narrow_stride_);
    e_->product.multiply({channels_, narrow, positions}, {du_, 1, stride_}, {x_, narrow_stride_},
                         {grad_expand_, narrow_stride_}, before_.grad_expand, nothing);
    before_.grad_expand = true;
    Scalar* to = grad_x_ + first_ * e_->in.width * narrow;
    if (through_buffer()) {
      e_->product.multiply({positions, narrow, channels_}, {du_, stride_, 1}, {weight_, narrow_stride_},
                           {sum_, narrow_stride_}, false, nothing);
      e_->product.narrow(sum_, narrow_stride_, positions, narrow, to, before_.grad_x);
    } else {
      e_->product.multiply_exact({positions, narrow, channels_}, {du_, stride_}, {weight_, narrow_stride_},
                                 {to, narrow}, before_.grad_x);
    }
    first_ += count_;
    count_ = 0;
  }

 private:
  // Rows that are shorter than a vector.
  bool through_buffer() const { return e_->in.channels < e_->rows.lanes; }

  const Expansion<T, Scalar>* e_;
  const Scalar* x_mean_;
  Scalar* grad_x_;
  int64_t stride_, narrow_stride_;
  Scalar *du_ = nullptr, *x_ = nullptr, *sum_ = nullptr;
  int64_t first_ = 0, count_ = 0, channels_ = 0;
  const Scalar* weight_ = nullptr;
  Scalar* grad_expand_ = nullptr;
  Before before_ = {};
};

// Where the partial results of a piece go, all channels of each; grad_expand is not cleared.
template <class Scalar>
struct Partials {
  Scalar *grad_expand, *grad_weight, *sums;
};

template <class T, class Scalar>
struct Backward {
  const Expansion<T, Scalar>& e;
  MapShape out;
  DepthwiseGradientAtOutput<T, Scalar> dy;
  ChannelBlocks blocks;
  PackedWeight<Scalar> expand;
  std::vector<Scalar> scaled_weight;  // scale * expand_weight, (expanded channels, narrow_stride)
  std::vector<Scalar> weights;        // of the depthwise convolution, packed
  const Scalar *x_mean, *center;
  Scalar* grad_x;

  int64_t narrow_stride() const { return buffer_stride<Scalar>(e.in.channels); }

  // All channels of a group of samples and a band of rows: block by block, so that a block's weights stay in cache.
  void piece(Range samples, Range rows, const Partials<Scalar>& to) const {
    struct Buffers {
      ExpandedRows<T, Scalar> expanded;
      Ring<Scalar> of_dy;
      ReducedRows<T, Scalar> reduced;
      Scalar* workspace;
    };
    const int64_t vectors = vectors_of(blocks.most_channels(), e.rows.lanes);
    Buffers buffers = Scratch::lay_out([&](Scratch& scratch) {
      return Buffers{
          ExpandedRows<T, Scalar>(e, scratch, blocks.most_channels(), expand),
          Ring<Scalar>(scratch, e.conv.kernel, e.in.width, e.conv, vectors, e.rows.lanes),
          ReducedRows<T, Scalar>(e, x_mean, grad_x, scratch, buffer_stride<Scalar>(blocks.most_channels())),
          scratch.take<Scalar>(strip_columns(e.in.width + e.conv.column_shift, e.conv.kernel) * e.rows.lanes)};
    });
    buffers.expanded.h.clear();
    buffers.of_dy.clear();
    std::fill_n(to.grad_weight, blocks.vectors() * e.rows.lanes * e.conv.taps(), Scalar(0));
    std::fill_n(to.sums, blocks.vectors() * e.rows.lanes * 2, Scalar(0));
    for (int64_t block = 0; block < blocks.blocks(); ++block)
      for (int64_t sample = samples.begin; sample < samples.end;) {
        const Range run = run_of({sample, samples.end}, rows, out.height);
        march(run, rows, block, {block > 0, sample > samples.begin}, to, buffers);
        sample = run.end;
      }
  }

  // Of grad and y, what the rows of dy from `row` on are made from until the next product. Rows are counted from the
  // first of the first sample on.
  Upcoming after(int64_t row, int64_t end, Range channels) const {
    const int64_t rows = std::min(divide_up(e.rows_at_once(), e.conv.stride), end - row);
    if (rows <= 0) return {};
    const OutputGradient<T, Scalar> from = dy.row(out, 0, row, channels.begin);
    return {{reinterpret_cast<const char*>(from.grad.data), reinterpret_cast<const char*>(from.y.data)},
            channels.size() * int64_t(sizeof(T)),
            out.channels * int64_t(sizeof(T)),
            rows * out.width};
  }

  // Rows `rows` of the output of each sample of a run, for one block of channels.
  template <class Buffers>
  void march(Range run, Range rows, int64_t block, typename ReducedRows<T, Scalar>::Before before,
             const Partials<Scalar>& to, Buffers& buffers) const {
    const Convolution& conv = e.conv;
    const Range channels = blocks.channels_of(block);
    const Range needed = {
        conv.inputs(rows.begin, e.in.height).begin,
        std::max(conv.inputs(rows.end - 1, e.in.height).end, std::min(e.in.height, rows.end * conv.stride))};
    const int64_t first = run.begin * e.in.height, last = (run.end - 1) * e.in.height;
    buffers.expanded.begin({first + needed.begin, last + needed.end}, channels);
    buffers.reduced.begin(first + rows.begin * conv.stride, channels.size(),
                          scaled_weight.data() + channels.begin * narrow_stride(),
                          to.grad_expand + channels.begin * narrow_stride(), before);
    for (int64_t sample = run.begin; sample < run.end; ++sample)
      march_sample(sample, (run.end - 1) * out.height + rows.end, rows, block, to, buffers);
    buffers.reduced.flush();
  }

  // `end`: of the rows of the output of the run.
  template <class Buffers>
  void march_sample(int64_t sample, int64_t end, Range rows, int64_t block, const Partials<Scalar>& to,
                    Buffers& buffers) const {
    const Convolution& conv = e.conv;
    const auto& at_output = depthwise_tables().of(T());
    auto& [expanded, of_dy, reduced, workspace] = buffers;
    const Range channels = blocks.channels_of(block);
    const int64_t first = blocks.first_vector(block) * e.rows.lanes, before = sample * e.in.height;
    const RowSize in_row = {e.in.width, channels.size()}, out_row = {out.width, channels.size()};
    const Scalar* weight = weights.data() + first * conv.taps();
    int64_t next_dy = conv.outputs(rows.begin * conv.stride, out.height).begin;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Range inputs = {row * conv.stride, std::min(e.in.height, (row + 1) * conv.stride)};
      for (const int64_t dy_end = conv.outputs(inputs.end - 1, out.height).end; next_dy < dy_end; ++next_dy)
        at_output.output_gradient(dy.row(out, sample, next_dy, channels.begin), out_row, of_dy[next_dy]);
      const Range reads = conv.inputs(row, e.in.height);
      expanded.advance(before + std::max(reads.end, inputs.end), after(sample * out.height + next_dy, end, channels));
      of(e.rows.weight_gradient, conv)(of_dy[row], input_taps(expanded.h, conv, row, reads, before), out_row,
                                       to.grad_weight + first * conv.taps());
      for (int64_t r = inputs.begin; r < inputs.end; ++r) {
        of(e.rows.input_gradient, conv)(output_taps(of_dy, conv, r, conv.outputs(r, out.height)), weight, in_row,
                                        {expanded.y1(before + r),
                                         reduced.next(),
                                         e.affine.at(channels.begin),
                                         center + channels.begin,
                                         to.sums + first * 2,
                                         {},
                                         conv.column_shift},
                                        workspace);
        reduced.keep();
      }
    }
  }
};

// scale * expand_weight, rows padded.
template <class T, class Scalar>
std::vector<Scalar> scaled_expand_weight(const Expansion<T, Scalar>& e, const Scalar* weight, int64_t stride) {
  std::vector<Scalar> scaled(static_cast<size_t>(e.channels * stride));
  parallel_shares(e.channels * e.in.channels, [&](int64_t share, int64_t shares) {
    const Range mine = part_of(e.channels, shares, share);
    for (int64_t o = mine.begin; o < mine.end; ++o) {
      const Scalar scale = e.affine.scale[o];
      const Scalar* from = weight + o * e.in.channels;
      Scalar* to = scaled.data() + o * stride;
      for (int64_t i = 0; i < e.in.channels; ++i) to[i] = scale * from[i];
    }
  });
  return scaled;
}

template <class T, class Scalar>
std::tuple<Tensor, Tensor, Tensor, Tensor> expand_depthwise_backward(const Expansion<T, Scalar>& e,
                                                                     const OutputGradientTensors& at_output,
                                                                     const Tensor& x_mean, const Tensor& expand_weight,
                                                                     const NormGradientArguments& norm,
                                                                     const Tensor& weight) {
  const ScalarType wide = dtype_of<Scalar>;
  const Convolution& conv = e.conv;
  const MapShape out = {e.in.samples, e.channels, conv.output_size(e.in.height), conv.output_size(e.in.width)};
  Tensor grad_x = empty_map(e.in, wide);
  Tensor grad_expand = empty_tensor({e.channels, e.in.channels, 1, 1}, wide);
  Tensor grad_weight = empty_tensor({e.channels, 1, conv.kernel, conv.kernel}, wide);
  Tensor coefficients = empty_tensor({6, e.channels}, wide);

  const int64_t columns_of_dy = conv.kernel * (out.width + conv.kernel);
  const int64_t of_reduction = e.rows_at_once() * e.in.width + 2 * e.in.channels;
  constexpr int64_t kCacheBytes = 576 << 10;  // more than elsewhere: every block of channels reads grad_x again
  const ChannelBlocks blocks(e.channels, e.rows.lanes,
                             e.bytes_a_channel() + (columns_of_dy + of_reduction) * int64_t(sizeof(Scalar)),
                             kCacheBytes);
  const Scalar* expand_values = values_of<Scalar>(expand_weight, e.channels * e.in.channels, "expand_weight");
  const Backward<T, Scalar> backward = {
      e,
      out,
      DepthwiseGradientAtOutput<T, Scalar>(at_output, out),
      blocks,
      packed_expansion(e, expand_weight),
      scaled_expand_weight(e, expand_values, buffer_stride<Scalar>(e.in.channels)),
      packed_for_input_gradient(e.rows, blocks, conv, values_of<Scalar>(weight, e.channels * conv.taps(), "weight")),
      values_of<Scalar>(x_mean, e.in.channels, "x_mean"),
      values_of<Scalar>(norm.moments, 2 * e.channels, "moments"),  // its first row
      static_cast<Scalar*>(grad_x.mutable_data_ptr())};

  // All channels of a piece are one block of the partition. Each leaves a partial result as large as the weights, which
  // is to be small beside its maps.
  constexpr int64_t kMapsPerPartial = 4;
  const int64_t worth =
      e.in.rows() * (e.channels + e.in.channels) / std::max<int64_t>(1, kMapsPerPartial * e.channels * e.in.channels);
  const Partition partition(e.in.samples, out.height, ChannelBlocks::whole(e.channels, e.rows.lanes),
                            std::clamp(worth, Partition::kLeastPieces, Partition::kPieces));
  const int64_t count = partition.partials(), lanes = blocks.vectors() * e.rows.lanes;
  const int64_t expand_size = e.channels * backward.narrow_stride();
  // Cleared by the threads that fill them.
  const auto of_expand = std::make_unique_for_overwrite<Scalar[]>(static_cast<size_t>(count * expand_size));
  const auto of_weight = std::make_unique_for_overwrite<Scalar[]>(static_cast<size_t>(count * lanes * conv.taps()));
  const auto of_sums = std::make_unique_for_overwrite<Scalar[]>(static_cast<size_t>(count * lanes * 2));
  if (e.in.rows() == 0) {
    std::fill_n(of_expand.get(), count * expand_size, Scalar(0));
    std::fill_n(of_weight.get(), count * lanes * conv.taps(), Scalar(0));
    std::fill_n(of_sums.get(), count * lanes * 2, Scalar(0));
  }
  for_each_piece(partition, 3 * e.in.rows() * e.channels * (e.in.channels + conv.taps()), [&](int64_t at, int64_t) {
    backward.piece(partition.samples_of(at), partition.rows_of(at),
                   {of_expand.get() + at * expand_size, of_weight.get() + at * lanes * conv.taps(),
                    of_sums.get() + at * lanes * 2});
  });
  merge_sums(of_expand.get(), count, expand_size);
  merge_sums(of_weight.get(), count, lanes * conv.taps());
  merge_sums(of_sums.get(), count, lanes * 2);
  Scalar* to = static_cast<Scalar*>(grad_expand.mutable_data_ptr());
  for (int64_t o = 0; o < e.channels; ++o)
    std::copy_n(of_expand.get() + o * backward.narrow_stride(), e.in.channels, to + o * e.in.channels);
  unpack(e.rows, blocks, of_weight.get(), conv.taps(), static_cast<Scalar*>(grad_weight.mutable_data_ptr()),
         conv.taps(), 1);
  unpack(e.rows, blocks, of_sums.get(), 2, row_of<Scalar>(coefficients, 4), 1, e.channels);
  finish_coefficients(coefficients, e.in.rows(), norm);
  return {grad_x, grad_expand, grad_weight, coefficients};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> expand_depthwise_backward_cpu(
    Tensor x, Tensor x_mean, Tensor expand_weight, Tensor affine, Tensor moments, Tensor weight, Tensor y,
    Tensor y_affine, Tensor y_coefficients, OptionalTensor grad, OptionalTensor pool_grad, int64_t y_activation,
    int64_t activation, int64_t stride, bool same_padding, double eps, bool frozen) {
  const Activation function = checked_activation(activation, "activation");
  const OptionalTensor of_y = y, of_affine = y_affine, of_coefficients = y_coefficients;
  const OutputGradientTensors at_output = {
      grad, pool_grad, of_y, of_affine, of_coefficients, checked_activation(y_activation, "y_activation")};
  return with_element(x.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Scalar = decltype(accumulator);
    return expand_depthwise_backward(
        expansion_of<T, Scalar>(x, expand_weight, affine, function, weight, stride, same_padding), at_output, x_mean,
        expand_weight, {affine, moments, eps, frozen}, weight);
  });
}

}  // namespace biasloss
