#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../gram_product_call.h"
#include "../moments_call.h"
#include "arguments.h"

namespace samerge {

// The addresses of matrices first ... of a list, as many as travel with a launch.
static gpu::Addresses some_addresses(const std::vector<const void*>& matrices, const std::vector<const void*>& bases,
                                     int64_t first) {
  gpu::Addresses at{};
  at.count = std::min<int64_t>(gpu::Addresses::kMost, matrices.size() - first);
  std::copy_n(matrices.begin() + first, at.count, at.matrices);
  if (!bases.empty()) std::copy_n(bases.begin() + first, at.count, at.bases);
  return at;
}

at::Tensor gram_product_cuda(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                             const at::Tensor& q,
                             const at::Tensor& scale) {  // B of [m, n], [B, width, side], [B] -> as q
  const auto dense_q = q.contiguous(), dense_scale = scale.contiguous();
  const auto pointers = addresses(matrices, at::kCUDA), base_pointers = addresses(bases, at::kCUDA);
  GramProduct a = gram_product_call(matrices, bases, dense_q, dense_scale);
  const c10::cuda::CUDAGuard guard(q.device());
  const auto out = at::empty_like(dense_q);
  if (out.numel() == 0) return out;
  const int64_t longer = a.tall() ? a.rows : a.columns, numbers = a.width * a.side();
  a.chunk = (std::max<int64_t>(192, (longer + kMaxChunks - 1) / kMaxChunks) + 7) / 8 * 8;
  a.chunks = (longer + a.chunk - 1) / a.chunk;
  a.bases = bases.empty() ? nullptr : base_pointers.data();
  const int64_t batch = matrices.size();
  const auto partials = at::empty({std::min<int64_t>(batch, gpu::Addresses::kMost), a.chunks, numbers}, q.options());
  a.partials = partials.mutable_data_ptr();
  for (int64_t first = 0; first < batch; first += gpu::Addresses::kMost) {
    GramProduct some = a;
    some.q = static_cast<const char*>(a.q) + first * numbers * q.element_size();
    some.scale = a.scale + first;
    auto* target = static_cast<char*>(out.mutable_data_ptr()) + first * numbers * q.element_size();
    C10_CUDA_CHECK(gpu::gram_product(some, some_addresses(pointers, base_pointers, first), target,
                                     c10::cuda::getCurrentCUDAStream()));
  }
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
