#include <ATen/Parallel.h>

#include <memory>

#include "../gram_product_call.h"
#include "../lanczos.h"
#include "levels.h"

namespace samerge {
namespace {

// Of one thread, at a multiple of 64.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(new char[bytes + 63]) {}
  void* data() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes_.get()) + 63) / 64 * 64); }

 private:
  std::unique_ptr<char[]> bytes_;
};

}  // namespace

// Steps first ... last - 1 of `width` vectors; those of step s lie at s * width in the basis, and its results behind
// them. Where there are matrices enough for all threads, a thread takes one after the other through all steps, in which
// a small matrix stays in its cache; else the threads share every product. The numbers are the same.
at::Tensor lanczos_cpu(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                       const at::Tensor& scale,
                       const at::Tensor& basis,                       // [B, capacity, stride], float32 or float64
                       const at::Tensor& projected,                   // [B, size, size] float64
                       int64_t width, int64_t first, int64_t last) {  // -> leaving [B, width, width] float64
  const int64_t batch = matrices.size(), side = std::min(matrices[0].size(0), matrices[0].size(1));
  TORCH_CHECK_VALUE(basis.dim() == 3 && basis.size(0) == batch && basis.size(1) >= (last + 1) * width &&
                        basis.size(2) >= side && basis.size(2) % kBasisLanes == 0 && basis.is_contiguous(),
                    "basis must be [B, at least (last + 1) * width, at least the shorter side, a multiple of ",
                    kBasisLanes, "]");
  TORCH_CHECK_VALUE(projected.dim() == 3 && projected.size(0) == batch && projected.size(1) >= last * width &&
                        projected.size(2) == projected.size(1) && projected.is_contiguous() &&
                        projected.scalar_type() == at::kDouble,
                    "projected must be [B, size, size] float64, size at least last * width");
  const auto q = basis.narrow(1, first * width, width).narrow(2, 0, side).clone(at::MemoryFormat::Contiguous);
  const auto leaving = projected.new_empty({batch, width, width});
  const auto dense_scale = scale.contiguous();
  const auto pointers = addresses(matrices, at::kCPU), base_pointers = addresses(bases, at::kCPU);
  GramProduct product = gram_product_call(matrices, bases, q, dense_scale);
  const std::unique_ptr<char[]> partials(new char[product.chunks * q.nbytes()]);
  product.partials = partials.get();
  product.matrices = pointers.data();
  product.bases = bases.empty() ? nullptr : base_pointers.data();

  Lanczos a{};
  a.basis = basis.mutable_data_ptr();
  a.q = q.mutable_data_ptr();
  a.projected = projected.mutable_data_ptr<double>();
  a.leaving = leaving.mutable_data_ptr<double>();
  a.partials = partials.get();
  a.capacity = basis.size(1);
  a.stride = basis.size(2);
  a.size = projected.size(1);
  a.width = width;
  a.side = side;
  a.chunks = product.chunks;
  a.wide = product.wide;

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
