#pragma once

#include "matrices.h"
#include "moments.h"

namespace samerge {

// The arguments of loops and kernels, all but the addresses of matrices and partials.
inline MomentsCall moments_call(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases) {
  check_bases(matrices, bases);
  MomentsCall a{};
  a.rows = matrices[0].size(0);
  a.columns = matrices[0].size(1);
  a.matrix_stride = matrices[0].stride(0);
  a.matrix_dtype = dtype_of(matrices[0]);
  a.base_dtype = bases.empty() ? a.matrix_dtype : dtype_of(bases[0]);
  a.base_stride = bases.empty() ? 0 : bases[0].stride(0);
  const int64_t pieces = a.rows * ((a.columns + kPiece - 1) / kPiece);
  a.segments = (pieces + kSegmentPieces - 1) / kSegmentPieces;
  return a;
}

}  // namespace samerge
