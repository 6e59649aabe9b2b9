#include <ATen/Parallel.h>

#include <memory>

#include "../gram_product_call.h"
#include "levels.h"
#include "scratch.h"

namespace samerge {

template <class Real>
static void add_chunks(const GramProduct& a, int64_t matrix, Real* out) {  // partials[matrix] -> [width, side]
  const int64_t numbers = a.width * a.side();
  const Real* chunks = static_cast<const Real*>(a.partials) + matrix * a.chunks * numbers;
  for (int64_t i = 0; i < numbers; ++i) {
    double total = 0;
    for (int64_t c = 0; c < a.chunks; ++c) total += chunks[c * numbers + i];
    out[i] = total;
  }
}

at::Tensor gram_product_cpu(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                            const at::Tensor& q,
                            const at::Tensor& scale) {  // B of [m, n], [B, width, side], [B] -> as q
  const auto dense_q = q.contiguous(), dense_scale = scale.contiguous();
  const auto pointers = addresses(matrices, at::kCPU), base_pointers = addresses(bases, at::kCPU);
  GramProduct a = gram_product_call(matrices, bases, dense_q, dense_scale);
  const auto out = dense_q.new_empty(dense_q.sizes());
  if (out.numel() == 0) return out;
  std::unique_ptr<char[]> partials;
  const int64_t batch = matrices.size();
  a.partials = out.mutable_data_ptr();
  if (a.chunks > 1) {
    partials.reset(new char[a.chunks * out.nbytes()]);
    a.partials = partials.get();
  }
  a.matrices = pointers.data();
  a.bases = bases.empty() ? nullptr : base_pointers.data();
  const auto loop = loops().gram_product;
  const int64_t scratch_bytes = loop(a, 0, 0, nullptr);
  at::parallel_for(0, batch * a.chunks, 1,
                   [&](int64_t first, int64_t last) { loop(a, first, last, Scratch(scratch_bytes).data()); });
  if (a.chunks > 1) {
    at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (a.wide)
          add_chunks(a, i, out.mutable_data_ptr<double>() + i * a.width * a.side());
        else
          add_chunks(a, i, out.mutable_data_ptr<float>() + i * a.width * a.side());
      }
    });
  }
  return out;
}

}  // namespace samerge
