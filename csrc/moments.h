#pragma once

#include "dtype.h"

namespace samerge {

// Mean, sum of squared deviations from it, and largest magnitude of numbers; NaN among them makes the magnitude NaN.
struct Moments {
  double count, mean, squares, largest;
};

// The moments of both, by Chan, Golub and LeVeque's update.
SAMERGE_ANYWHERE void combine(Moments& a, const Moments& b) {
  if (!b.count) return;
  const double count = a.count + b.count, step = b.mean - a.mean;
  a.mean += step * (b.count / count);
  a.squares += b.squares + step * step * (a.count * b.count / count);
  a.largest = b.largest > a.largest || b.largest != b.largest ? b.largest : a.largest;
  a.count = count;
}

// The moments of W = bases[i] + matrices[i], a segment of pieces at a time; a piece is at most kPiece numbers of one
// row.
struct MomentsCall {
  Moments* partials;            // [B, segments]
  const void* const* matrices;  // [B], each [rows, columns]
  const void* const* bases;     // [B], or null where W is the matrix alone
  int64_t rows, columns;
  int64_t matrix_stride, base_stride;  // between rows, in numbers
  int64_t segments;                    // of a matrix
  DType matrix_dtype, base_dtype;
};

constexpr int64_t kPiece = 1024, kSegmentPieces = 128;

}  // namespace samerge
