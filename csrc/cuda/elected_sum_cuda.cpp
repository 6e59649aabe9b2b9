#include <ATen/ops/empty_like.h>

#include "../elected_sum_call.h"
#include "arguments.h"

namespace samerge {

at::Tensor elected_sum_cuda(const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& weights,
                            double scale,
                            bool normalize) {  // [N], [T, N], [T]
  check_elected_sum(base, task_vectors, weights, at::kCUDA);
  const c10::cuda::CUDAGuard guard(base.device());
  const auto dense_base = aligned(base), tasks = aligned_rows(task_vectors), rounded = rounded_weights(weights, tasks);
  const auto out = at::empty_like(dense_base);
  if (out.numel() == 0) return out;
  const ElectedSum a = elected_sum_call(out, dense_base, tasks, rounded, scale, normalize);
  C10_CUDA_CHECK(gpu::elected_sum(a, out.numel() / kBlock, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace samerge
