#include <ATen/ops/empty_like.h>

#include "../weighted_sum_call.h"
#include "arguments.h"

namespace samerge {

void weighted_sum_cuda(
    const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& coefficients,
    const at::Tensor& block_layer,
    const std::optional<at::Tensor>& scales) {  // [N], [N], [T, N], [T, L], [N / kBlock], [T, N / kGroup]
  check_weighted_sum(out, base, task_vectors, coefficients, block_layer, scales, at::kCUDA);
  if (base.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(base.device());
  const auto written = on_16_bytes(out) ? out : at::empty_like(out);
  const auto dense_base = aligned(base), tasks = aligned_rows(task_vectors), lambda = coefficients.contiguous(),
             layer = block_layer.contiguous();
  const auto dense_scales = dense_rows(scales);
  const WeightedSum a = weighted_sum_call(written, dense_base, tasks, lambda, layer, dense_scales);
  C10_CUDA_CHECK(gpu::weighted_sum(a, layer.numel(), c10::cuda::getCurrentCUDAStream()));
  if (!written.is_same(out)) out.copy_(written);
}

}  // namespace samerge
