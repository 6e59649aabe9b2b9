#include <ATen/ops/empty.h>

#include "../lanczos_call.h"
#include "matrix_arguments.h"

namespace samerge {

// As lanczos_cpu. Every step is one product and five more kernels on the current stream; nothing is allocated between them and
// nothing waits for the device, so that all steps of a call can be captured in a CUDA graph.
at::Tensor lanczos_cuda(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                        const at::Tensor& scale,
                        const at::Tensor& basis,                       // [B, capacity, stride], float32 or float64
                        const at::Tensor& projected,                   // [B, size, size] float64
                        int64_t width, int64_t first, int64_t last) {  // -> leaving [B, width, width] float64
  gpu::LanczosStep a{lanczos_call(matrices, basis, projected, width, last)};
  TORCH_CHECK_VALUE(on_16_bytes(basis), "basis must begin at a multiple of 16 bytes");
  const c10::cuda::CUDAGuard guard(basis.device());
  const auto q = basis.narrow(1, first * width, width).narrow(2, 0, a.side).clone(at::MemoryFormat::Contiguous);
  const auto dense_scale = scale.contiguous();
  MatrixProducts products(matrices, bases, q, dense_scale);
  a.batch = matrices.size();
  a.chunks = products.all.chunks;
  a.piece = gpu::lanczos_piece(a.stride);
  a.pieces = (a.stride + a.piece - 1) / a.piece;

  const auto real = basis.options(), wide = projected.options();
  const int64_t twice = a.wide ? 2 : 1, most_known = last * width, all_pieces = a.batch * a.pieces;
  const auto partials = at::empty({a.batch, a.chunks, width, a.side}, real);
  const auto x = at::empty({a.batch, width, a.stride}, real);
  const auto dots = at::empty({all_pieces, width, most_known}, real);
  const auto inside = at::empty({2, a.batch, width, most_known}, real);
  const auto gram = at::empty({all_pieces, width, width, twice}, wide);
  const auto eliminated = at::empty({all_pieces, width, width, twice}, wide);
  const auto sizes = at::empty({a.batch, gpu::kLanczosWarps, width}, wide);
  const auto negligible = at::empty({all_pieces, width}, wide);
  const auto factors = at::empty({2, all_pieces, width, width}, real);
  const auto leaving = at::empty({a.batch, width, width}, wide);
  products.all.partials = partials.mutable_data_ptr();
  a.partials = partials.const_data_ptr();
  a.q = q.mutable_data_ptr();
  a.leaving = leaving.mutable_data_ptr<double>();
  a.x = x.mutable_data_ptr();
  a.dots = dots.mutable_data_ptr();
  a.inside = inside.mutable_data_ptr();
  a.gram = gram.mutable_data_ptr();
  a.eliminated = eliminated.mutable_data_ptr();
  a.sizes = sizes.mutable_data_ptr<double>();
  a.negligible = negligible.mutable_data_ptr<double>();
  a.factors = factors.mutable_data_ptr();

  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (int64_t step = first; step < last; ++step) {
    for (int64_t i = 0; i < a.batch; i += gpu::Addresses::kMost) C10_CUDA_CHECK(products.launch(i, nullptr, stream));
    a.known = (step + 1) * width;
    C10_CUDA_CHECK(gpu::orthogonalise(a, stream));
  }
  return leaving;
}

}  // namespace samerge
