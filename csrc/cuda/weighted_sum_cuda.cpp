#include <ATen/ops/empty_like.h>

#include "arguments.h"

namespace samerge {

void weighted_sum_cuda(const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors,
                       const at::Tensor& coefficients,
                       const at::Tensor& block_layer) {  // [N], [N], [T, N], [T, L], [N / kBlock]
  check_packed(base, task_vectors, block_layer, at::kCUDA);
  TORCH_CHECK_VALUE(out.sizes() == base.sizes() && out.is_contiguous() && out.device() == base.device() &&
                        accumulator(out) == accumulator(base),
                    "out must be contiguous, of the base's shape, and float64 only where base is");
  TORCH_CHECK_VALUE(coefficients.dim() == 2 && coefficients.size(0) == task_vectors.size(0) &&
                        coefficients.scalar_type() == accumulator(base) && coefficients.device() == base.device(),
                    "coefficients must be [T, L] of the accumulation dtype");
  if (base.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(base.device());
  const auto written = on_16_bytes(out) ? out : at::empty_like(out);
  const auto dense_base = aligned(base), tasks = aligned_rows(task_vectors), lambda = coefficients.contiguous(),
             layer = block_layer.contiguous();

  WeightedSum a;
  a.out = written.mutable_data_ptr();
  a.base = dense_base.const_data_ptr();
  a.task_vectors = tasks.const_data_ptr();
  a.coefficients = lambda.const_data_ptr();
  a.block_layer = layer.const_data_ptr<int32_t>();
  a.num_tasks = tasks.size(0);
  a.num_layers = lambda.size(1);
  a.task_stride = tasks.stride(0);
  a.out_dtype = dtype_of(out);
  a.base_dtype = dtype_of(base);
  a.task_dtype = dtype_of(tasks);
  C10_CUDA_CHECK(gpu::weighted_sum(a, layer.numel(), c10::cuda::getCurrentCUDAStream()));
  if (!written.is_same(out)) out.copy_(written);
}

}  // namespace samerge
