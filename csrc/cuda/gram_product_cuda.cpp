#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../moments_call.h"
#include "matrix_arguments.h"

namespace samerge {

at::Tensor gram_product_cuda(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                             const at::Tensor& q,
                             const at::Tensor& scale) {  // B of [m, n], [B, width, side], [B] -> as q
  const auto dense_q = q.contiguous(), dense_scale = scale.contiguous();
  MatrixProducts products(matrices, bases, dense_q, dense_scale);
  const c10::cuda::CUDAGuard guard(q.device());
  const auto out = at::empty_like(dense_q);
  if (out.numel() == 0) return out;
  const int64_t batch = matrices.size(), at_once = std::min<int64_t>(batch, gpu::Addresses::kMost);
  const auto partials = at::empty({at_once, products.all.chunks, q.size(1) * q.size(2)}, q.options());
  products.all.partials = partials.mutable_data_ptr();
  for (int64_t first = 0; first < batch; first += gpu::Addresses::kMost)
    C10_CUDA_CHECK(products.launch(first, out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

at::Tensor moments_cuda(const std::vector<at::Tensor>& matrices,
                        const std::vector<at::Tensor>& bases) {  // B of [m, n] -> [B, 4]
  const auto pointers = addresses(matrices, at::kCUDA), base_pointers = addresses(bases, at::kCUDA);
  MomentsCall a = moments_call(matrices, bases);
  const c10::cuda::CUDAGuard guard(matrices[0].device());
  const auto wide = matrices[0].options().dtype(at::kDouble);
  const int64_t batch = matrices.size();
  const auto out = at::empty({batch, 4}, wide);
  const auto partials = at::empty({std::min<int64_t>(batch, gpu::Addresses::kMost), a.segments, 4}, wide);
  a.partials = static_cast<Moments*>(partials.mutable_data_ptr());
  a.bases = bases.empty() ? nullptr : base_pointers.data();
  for (int64_t first = 0; first < batch; first += gpu::Addresses::kMost)
    C10_CUDA_CHECK(gpu::moments(a, some_addresses(pointers, base_pointers, first),
                                out.mutable_data_ptr<double>() + first * 4, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace samerge
