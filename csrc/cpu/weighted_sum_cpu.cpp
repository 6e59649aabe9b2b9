#include <ATen/core/Tensor.h>

#include "../weighted_sum_call.h"
#include "arguments.h"
#include "levels.h"
#include "parallel.h"

namespace samerge {

void weighted_sum_cpu(
    const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& coefficients,
    const at::Tensor& block_layer,
    const std::optional<at::Tensor>& scales) {  // [N], [N], [T, N], [T, L], [N / kBlock], [T, N / kGroup]
  const auto layer = block_layer.contiguous();
  check_weighted_sum(out, base, task_vectors, coefficients, layer, scales, at::kCPU);
  check_block_layer(layer, coefficients.size(1));
  if (base.numel() == 0) return;
  const auto dense_base = base.contiguous(), tasks = dense_rows(task_vectors), lambda = coefficients.contiguous();
  const auto dense_scales = dense_rows(scales);
  const WeightedSum a = weighted_sum_call(out, dense_base, tasks, lambda, layer, dense_scales);
  const auto loop = loops().weighted_sum;
  const bool streamed = is_streamed(out);
  constexpr int64_t kLeastBlocks = 32;  // fewer do not pay for a thread
  constexpr int64_t kPieceBlocks = 512;
  share_out(layer.numel(), kLeastBlocks, kPieceBlocks,
            [&](int64_t first, int64_t last) { loop(a, first, last, streamed); });
}

}  // namespace samerge
