#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "levels.h"
#include "parallel.h"

namespace samerge {

constexpr int64_t kSegmentBlocks =
    64;  // whose sums are added: fixed, so that they do not depend on the number of threads
constexpr int64_t kPieceSegments = 8;

// The first block of every segment, then the number of blocks. A segment has at most kSegmentBlocks, all of one layer, whose
// blocks follow each other.
static std::vector<int64_t> cut_into_segments(const at::Tensor& block_layer) {
  const auto* layer = block_layer.const_data_ptr<int32_t>();
  const int64_t blocks = block_layer.numel();
  std::vector<int64_t> begin = {0};
  while (begin.back() < blocks) {
    const auto* first = layer + begin.back();
    const auto* last = std::min(first + kSegmentBlocks, layer + blocks);
    begin.push_back((*first == last[-1] ? last : std::upper_bound(first, last, *first)) - layer);
  }
  return begin;
}

at::Tensor coefficient_grad_cpu(
    const at::Tensor& grad, const at::Tensor& task_vectors, const at::Tensor& block_layer, int64_t num_layers,
    const std::optional<at::Tensor>& scales) {  // [N], [T, N], [N / kBlock], L, [T, N / kGroup] -> [T, L]
  const auto layer = block_layer.contiguous();
  check_packed(grad, task_vectors, layer, scales, at::kCPU);
  check_block_layer(layer, num_layers);
  const auto out = grad.new_zeros({task_vectors.size(0), num_layers}, grad.options().dtype(accumulator(grad)));
  if (grad.numel() == 0 || out.numel() == 0) return out;
  const auto dense_grad = grad.contiguous(), tasks = dense_rows(task_vectors);
  const auto dense_scales = dense_rows(scales);
  const auto segment_begin = cut_into_segments(layer);
  const int64_t segments = segment_begin.size() - 1, num_tasks = tasks.size(0);
  std::vector<double> partials(segments * num_tasks);

  CoefficientGrad a;
  a.partials = partials.data();
  a.grad = dense_grad.const_data_ptr();
  set_task_vectors(a, tasks, dense_scales);
  a.segment_begin = segment_begin.data();
  a.grad_dtype = dtype_of(grad);
  const auto loop = loops().coefficient_grad;
  share_out(segments, 1, kPieceSegments, [&](int64_t first, int64_t last) { loop(a, first, last); });

  std::vector<double> sums(out.numel());  // [T, L]
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t l = layer.const_data_ptr<int32_t>()[segment_begin[segment]];
    for (int64_t t = 0; t < num_tasks; ++t) sums[t * num_layers + l] += partials[segment * num_tasks + t];
  }
  if (out.scalar_type() == at::kDouble)
    std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<double>());
  else
    std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace samerge
