#pragma once

#include "dtype.h"

namespace samerge {

// z[i] = q[i] W^T W where W = scale[i] * (bases[i] + matrices[i]) has no more columns than rows, else z[i] = q[i] W
// W^T. The longer side is cut into chunks; a chunk's z is one row of partials.
struct GramProduct {
  void* partials;               // [B, chunks, width, side] Real, which is double where wide, else float
  const void* const* matrices;  // [B], each [rows, columns]
  const void* const* bases;     // [B], or null where W is the matrix alone
  const void* q;                // [B, width, side] Real
  const double* scale;          // [B]
  int64_t rows, columns;
  int64_t matrix_stride, base_stride;  // between rows, in numbers
  int64_t width;                       // a multiple of kWidth
  int64_t chunk, chunks;               // rows of a chunk, columns where these are more; how many
  DType matrix_dtype, base_dtype;
  bool wide;

  SAMERGE_ANYWHERE bool tall() const { return columns <= rows; }
  SAMERGE_ANYWHERE int64_t side() const { return tall() ? columns : rows; }  // the shorter side
};

constexpr int kWidth = 4;  // vectors of q that are multiplied at once

// A chunk holds about this many numbers: fixed, so that sums depend on neither the threads nor the other matrices.
constexpr int64_t kChunkNumbers = int64_t(1) << 18, kMaxChunks = 32;  // the latter bounds the memory of partials

}  // namespace samerge
