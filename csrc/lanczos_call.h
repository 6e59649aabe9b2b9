#pragma once

#include "gram_product_call.h"
#include "lanczos.h"

namespace samerge {

// What a loop or kernel is told of all steps of a call, all but the addresses of q, leaving and partials.
inline Lanczos lanczos_call(const std::vector<at::Tensor>& matrices, const at::Tensor& basis,
                            const at::Tensor& projected, int64_t width, int64_t last) {
  TORCH_CHECK_VALUE(!matrices.empty() && matrices[0].dim() == 2, "there must be matrices of two dimensions");
  const int64_t batch = matrices.size(), side = std::min(matrices[0].size(0), matrices[0].size(1));
  TORCH_CHECK_VALUE(basis.dim() == 3 && basis.size(0) == batch && basis.size(1) >= (last + 1) * width &&
                        basis.size(2) >= side && basis.size(2) % kBasisLanes == 0 && basis.is_contiguous(),
                    "basis must be [B, at least (last + 1) * width, at least the shorter side, a multiple of ",
                    kBasisLanes, "]");
  TORCH_CHECK_VALUE(projected.dim() == 3 && projected.size(0) == batch && projected.size(1) >= last * width &&
                        projected.size(2) == projected.size(1) && projected.is_contiguous() &&
                        projected.scalar_type() == at::kDouble && projected.device() == basis.device(),
                    "projected must be [B, size, size] float64, size at least last * width");
  Lanczos a{};
  a.basis = basis.mutable_data_ptr();
  a.projected = projected.mutable_data_ptr<double>();
  a.capacity = basis.size(1);
  a.stride = basis.size(2);
  a.size = projected.size(1);
  a.width = width;
  a.side = side;
  a.wide = basis.scalar_type() == at::kDouble;
  return a;
}

}  // namespace samerge
