#pragma once

#include <algorithm>

#include "gram_product.h"
#include "matrices.h"

namespace samerge {

// The arguments of loops and kernels, all but the addresses of matrices and partials.
inline GramProduct gram_product_call(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                                     const at::Tensor& q, const at::Tensor& scale) {  // [B, width, side], [B]
  check_bases(matrices, bases);
  GramProduct a{};
  a.rows = matrices[0].size(0);
  a.columns = matrices[0].size(1);
  const int64_t batch = matrices.size();
  TORCH_CHECK_VALUE(
      q.dim() == 3 && q.size(0) == batch && q.size(1) % kWidth == 0 && q.size(2) == a.side() &&
          (q.scalar_type() == at::kDouble || q.scalar_type() == at::kFloat) && scale.numel() == batch &&
          scale.scalar_type() == at::kDouble && q.device() == matrices[0].device() && scale.device() == q.device(),
      "q must be [B, width, shorter side] float32 or float64, width a multiple of ", kWidth, ", and scale [B] float64");
  a.q = q.const_data_ptr();
  a.scale = scale.const_data_ptr<double>();
  a.wide = q.scalar_type() == at::kDouble;
  a.matrix_stride = matrices[0].stride(0);
  a.matrix_dtype = dtype_of(matrices[0]);
  a.base_dtype = bases.empty() ? a.matrix_dtype : dtype_of(bases[0]);
  a.base_stride = bases.empty() ? 0 : bases[0].stride(0);
  TORCH_CHECK_VALUE(a.wide || (a.matrix_dtype != DType::f64 && a.base_dtype != DType::f64),
                    "float64 matrices are multiplied in float64");
  a.width = q.size(1);
  const int64_t longer = a.tall() ? a.rows : a.columns, side = std::max<int64_t>(a.side(), 1);
  a.chunk = std::max(std::max<int64_t>(kChunkNumbers / side, 64), (longer + kMaxChunks - 1) / kMaxChunks);
  a.chunk = (a.chunk + 31) / 32 * 32;
  a.chunks = (longer + a.chunk - 1) / a.chunk;
  return a;
}

}  // namespace samerge
