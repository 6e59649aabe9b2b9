#include "../drop_call.h"
#include "arguments.h"

namespace samerge {

void drop_cuda(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys, const at::Tensor& thresholds,
               const at::Tensor& factors) {  // [T, n], [T, n], [T, stretches], [T], [T]
  const Drop a = drop_call(out, numbers, keys, thresholds, factors, at::kCUDA);
  const c10::cuda::CUDAGuard guard(numbers.device());
  if (numbers.numel() == 0) return;
  C10_CUDA_CHECK(gpu::drop(a, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace samerge
