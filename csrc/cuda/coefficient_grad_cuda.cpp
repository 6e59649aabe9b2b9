#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "arguments.h"

namespace samerge {

at::Tensor coefficient_grad_cuda(
    const at::Tensor& grad, const at::Tensor& task_vectors, const at::Tensor& block_layer, int64_t num_layers,
    const std::optional<at::Tensor>& scales) {  // [N], [T, N], [N / kBlock], L, [T, N / kGroup] -> [T, L]
  check_packed(grad, task_vectors, block_layer, scales, at::kCUDA);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto real = grad.options().dtype(accumulator(grad));
  if (grad.numel() == 0) return at::zeros({task_vectors.size(0), num_layers}, real);
  const auto out = at::empty({task_vectors.size(0), num_layers}, real);
  if (out.numel() == 0) return out;
  const auto dense_grad = aligned(grad), tasks = aligned_rows(task_vectors), layer = block_layer.contiguous();
  const auto dense_scales = dense_rows(scales);
  const auto partials = at::empty({layer.numel(), tasks.size(0)}, grad.options().dtype(at::kDouble));

  CoefficientGrad a{};
  a.partials = partials.mutable_data_ptr<double>();
  a.grad = dense_grad.const_data_ptr();
  set_task_vectors(a, tasks, dense_scales);
  a.grad_dtype = dtype_of(grad);
  C10_CUDA_CHECK(gpu::coefficient_grad(a, out.mutable_data_ptr(), layer.const_data_ptr<int32_t>(), layer.numel(),
                                       num_layers, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace samerge
