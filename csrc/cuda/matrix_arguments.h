#pragma once

#include "../gram_product_call.h"
#include "arguments.h"

namespace samerge {

// The addresses of matrices first ... of a list, as many as travel with a launch.
inline gpu::Addresses some_addresses(const std::vector<const void*>& matrices, const std::vector<const void*>& bases,
                                     int64_t first) {
  gpu::Addresses at{};
  at.count = std::min<int64_t>(gpu::Addresses::kMost, matrices.size() - first);
  std::copy_n(matrices.begin() + first, at.count, at.matrices);
  if (!bases.empty()) std::copy_n(bases.begin() + first, at.count, at.bases);
  return at;
}

// A list of matrices and their bases as the products read them, all but the address of partials.
struct MatrixProducts {
  std::vector<const void*> matrices, bases;
  GramProduct all;

  MatrixProducts(const std::vector<at::Tensor>& w, const std::vector<at::Tensor>& b, const at::Tensor& q,
                 const at::Tensor& scale)  // [B, width, side], [B], both contiguous
      : matrices(addresses(w, at::kCUDA)), bases(addresses(b, at::kCUDA)), all(gram_product_call(w, b, q, scale)) {
    const int64_t longer = all.tall() ? all.rows : all.columns;
    all.chunk = (std::max<int64_t>(192, (longer + kMaxChunks - 1) / kMaxChunks) + 7) / 8 * 8;
    all.chunks = (longer + all.chunk - 1) / all.chunk;
    all.bases = bases.empty() ? nullptr : bases.data();
  }

  int64_t q_bytes() const { return all.width * all.side() * (all.wide ? sizeof(double) : sizeof(float)); }

  // Of matrices first ...; their sums go to out [B, width, side], and none where it is null: then partials holds all.
  cudaError_t launch(int64_t first, void* out, cudaStream_t stream) const {
    GramProduct some = all;
    some.q = static_cast<const char*>(all.q) + first * q_bytes();
    some.scale = all.scale + first;
    void* const target = out ? static_cast<char*>(out) + first * q_bytes() : nullptr;
    if (!out) some.partials = static_cast<char*>(all.partials) + first * all.chunks * q_bytes();
    return gpu::gram_product(some, some_addresses(matrices, bases, first), target, stream);
  }
};

}  // namespace samerge
