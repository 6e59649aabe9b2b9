// A piece of at most 1,024 numbers is widened to double in the first-level cache and swept twice, for its mean and for
// the squares of the deviations from it; pieces are combined by Chan, Golub and LeVeque's update. So nothing cancels,
// however far the mean lies from zero, and memory is read once.
#pragma once

#include "../moments.h"
#include "panel.h"

namespace samerge::SAMERGE_LEVEL {

// x [kPiece], zeros from n on.
SAMERGE_INLINE Moments of_piece(const double* x, int64_t n) {
  Double sums = {}, largest = {};
  for (int64_t i = 0; i < n; i += kLanes<Double>) {
    const Double v = load<Double>(x + i), magnitude = v < 0.0 ? -v : v;
    sums += v;
    largest = (magnitude > largest) | (magnitude != magnitude) ? magnitude : largest;
  }
  const double mean = sum(sums) / n;
  Double squares = {};
  int64_t i = 0;
  for (; i + kLanes<Double> <= n; i += kLanes<Double>) {
    const Double d = load<Double>(x + i) - mean;
    squares += d * d;
  }
  double rest = 0;
  for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  Moments piece = {double(n), mean, sum(squares) + rest, 0};
  for (int lane = 0; lane < kLanes<Double>; ++lane)
    if (largest[lane] > piece.largest || largest[lane] != largest[lane]) piece.largest = largest[lane];
  return piece;
}

void moments(const MomentsCall& a, int64_t first, int64_t last) {  // segments of all matrices
  alignas(64) double x[kPiece], other[kPiece];
  const int64_t row_pieces = (a.columns + kPiece - 1) / kPiece, pieces = a.rows * row_pieces;
  for (int64_t segment = first; segment < last; ++segment) {
    const Source<double> source(a, segment / a.segments);
    const int64_t begin = segment % a.segments * kSegmentPieces;
    const int64_t end = begin + kSegmentPieces < pieces ? begin + kSegmentPieces : pieces;
    Moments total = {};
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t column = piece % row_pieces * kPiece;
      const int64_t n = a.columns - column < kPiece ? a.columns - column : kPiece;
      source.read(piece / row_pieces, column, n, x, other);
      for (int64_t i = n; i < kPiece && i < n + kLanes<Double>; ++i) x[i] = 0;
      combine(total, of_piece(x, n));
    }
    a.partials[segment] = total;
  }
}

}  // namespace samerge::SAMERGE_LEVEL
