#include <ATen/Parallel.h>

#include <memory>

#include "../lanczos_call.h"
#include "levels.h"
#include "scratch.h"

namespace samerge {

// Steps first ... last - 1 of `width` vectors; those of step s lie at s * width in the basis, and its results behind
// them. Where there are matrices enough for all threads, a thread takes one after the other through all steps, in which
// a small matrix stays in its cache; else the threads share every product. The numbers are the same.
at::Tensor lanczos_cpu(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                       const at::Tensor& scale,
                       const at::Tensor& basis,                       // [B, capacity, stride], float32 or float64
                       const at::Tensor& projected,                   // [B, size, size] float64
                       int64_t width, int64_t first, int64_t last) {  // -> leaving [B, width, width] float64
  Lanczos a = lanczos_call(matrices, basis, projected, width, last);
  const int64_t batch = matrices.size();
  const auto q = basis.narrow(1, first * width, width).narrow(2, 0, a.side).clone(at::MemoryFormat::Contiguous);
  const auto leaving = projected.new_empty({batch, width, width});
  const auto dense_scale = scale.contiguous();
  const auto pointers = addresses(matrices, at::kCPU), base_pointers = addresses(bases, at::kCPU);
  GramProduct product = gram_product_call(matrices, bases, q, dense_scale);
  const std::unique_ptr<char[]> partials(new char[product.chunks * q.nbytes()]);
  product.partials = partials.get();
  product.matrices = pointers.data();
  product.bases = bases.empty() ? nullptr : base_pointers.data();

  a.q = q.mutable_data_ptr();
  a.leaving = leaving.mutable_data_ptr<double>();
  a.partials = partials.get();
  a.chunks = product.chunks;

  const auto& loop = loops();
  const int64_t product_bytes = loop.gram_product(product, 0, 0, nullptr), bytes = loop.orthogonalise(a, 0, 0, nullptr);
  const auto multiply = [&](int64_t from, int64_t to, const Scratch& scratch) {
    loop.gram_product(product, from, to, scratch.data());
  };
  const auto orthogonalise = [&](int64_t step, int64_t from, int64_t to, const Scratch& scratch) {
    Lanczos now = a;
    now.known = (step + 1) * width;
    loop.orthogonalise(now, from, to, scratch.data());
  };
  if (batch >= 2 * at::get_num_threads()) {
    at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
      const Scratch scratch(std::max(product_bytes, bytes));
      for (int64_t i = from; i < to; ++i)
        for (int64_t step = first; step < last; ++step) {
          multiply(i * a.chunks, (i + 1) * a.chunks, scratch);
          orthogonalise(step, i, i + 1, scratch);
        }
    });
    return leaving;
  }
  for (int64_t step = first; step < last; ++step) {
    at::parallel_for(0, batch * a.chunks, 1,
                     [&](int64_t from, int64_t to) { multiply(from, to, Scratch(product_bytes)); });
    at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) { orthogonalise(step, from, to, Scratch(bytes)); });
  }
  return leaving;
}

}  // namespace samerge
