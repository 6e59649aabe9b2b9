// Gram-Schmidt in blocks, twice; rows of the basis and of z are whole vectors, with zeros behind their numbers.
#pragma once

#include "../lanczos.h"
#include "gram_product_loops.h"

namespace samerge::SAMERGE_LEVEL {

template <class Real>
SAMERGE_INLINE Real inner(const Real* x, const Real* y, int64_t n) {
  using Vector = typename VectorOf<Real>::type;
  Vector sums{};
  for (int64_t k = 0; k < n; k += kLanes<Vector>) sums += load<Vector>(x + k) * load<Vector>(y + k);
  return sum(sums);
}

// x [width, n] -= inside known, where inside = x known^T, [width / kWidth, count, kWidth], is returned negated; and the
// sizes that x had.
template <class Real>
void leave(Rows<Real> known, int64_t count, int64_t n, Real* x, int64_t width, Real* packed, Real* inside,
           Real* sizes) {
  for (int64_t j = 0; j < width; ++j) sizes[j] = __builtin_sqrt(inner(x + j * n, x + j * n, n));
  for (int64_t g = 0; g < width / kWidth; ++g) {
    Real *const some = x + g * kWidth * n, *const negated = inside + g * kWidth * count;
    for (int64_t k = 0; k < kWidth * count; ++k) negated[k] = 0;
    for (int j = 0; j < kWidth; ++j) Packed<Real>::pack(some + j * n, n, Real(-1), packed, j);
    dot<1>(known, count, n, packed, 0, negated, 0);
    accumulate<1>(known, count, n, negated, 0, some, n);
  }
}

// x [width, n] = factor [width, width] q, lower triangular; the orthonormal q takes its place. A vector of which no
// more is left than rounding leaves of its size is taken to be nothing, and an arbitrary one becomes its q.
template <class Real>
void orthonormalise(Real* x, int64_t width, int64_t n, int64_t side, const Real* sizes, uint32_t seed, Real* factor) {
  constexpr Real kRounding = sizeof(Real) == 8 ? 0x1p-49 : 0x1p-20;
  for (int64_t j = 0; j < width; ++j) {
    Real *const row = x + j * n, *const coefficients = factor + j * width;
    for (int64_t i = 0; i < width; ++i) coefficients[i] = 0;
    for (int64_t i = 0; i < j; ++i) {
      const Real* const other = x + i * n;
      coefficients[i] = inner(row, other, n);
      for (int64_t k = 0; k < n; ++k) row[k] -= coefficients[i] * other[k];
    }
    Real squares = inner(row, row, n);
    coefficients[j] = __builtin_sqrt(squares);
    if (coefficients[j] <= kRounding * sizes[j]) {
      coefficients[j] = 0;
      uint32_t state = (seed + j + 1) * 2654435761u;
      for (int64_t k = 0; k < side; ++k) row[k] = Real(state = state * 1664525u + 1013904223u) / Real(1u << 31) - 1;
      squares = inner(row, row, n);
    }
    const Real scale = 1 / Real(__builtin_sqrt(squares));
    for (int64_t k = 0; k < n; ++k) row[k] *= scale;
  }
}

// The numbers of one thread's scratch.
template <class Real>
struct Leaving {
  Real *z, *packed, *inside, *again, *factor, *last, *sizes;
  int64_t bytes;

  Leaving(const Lanczos& a, void* scratch) {
    auto* next = static_cast<Real*>(scratch);
    const auto take = [&](int64_t numbers) {
      auto* taken = next;
      next += (numbers + kBasisLanes - 1) / kBasisLanes * kBasisLanes;
      return taken;
    };
    z = take(a.width * a.stride);
    packed = take(kWidth * a.stride);
    inside = take(a.width * a.capacity);
    again = take(a.width * a.capacity);
    factor = take(a.width * a.width);
    last = take(a.width * a.width);
    sizes = take(a.width);
    bytes = (next - static_cast<Real*>(scratch)) * int64_t(sizeof(Real));
  }
};

template <class Real>
void orthogonalise_one(const Lanczos& a, int64_t i, const Leaving<Real>& room) {
  const int64_t known = a.known, width = a.width, side = a.side, stride = a.stride;
  const Real* const partials = static_cast<const Real*>(a.partials) + i * a.chunks * width * side;
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t k = 0; k < side; ++k) {
      double total = 0;
      for (int64_t c = 0; c < a.chunks; ++c) total += partials[(c * width + j) * side + k];
      room.z[j * stride + k] = total;
    }
    for (int64_t k = side; k < stride; ++k) room.z[j * stride + k] = 0;
  }

  // Twice, and normalised between, so that the second time removes what rounding left even where next to nothing
  // leaves.
  Real* const basis = static_cast<Real*>(a.basis) + i * a.capacity * stride;
  leave<Real>({basis, stride, 0}, known, stride, room.z, width, room.packed, room.inside, room.sizes);
  orthonormalise(room.z, width, stride, side, room.sizes, uint32_t(known), room.factor);
  leave<Real>({basis, stride, 0}, known, stride, room.z, width, room.packed, room.again, room.sizes);
  orthonormalise(room.z, width, stride, side, room.sizes, uint32_t(known), room.last);

  const auto at = [&](const Real* negated, int64_t j, int64_t r) {
    return -double(negated[j / kWidth * kWidth * known + r * kWidth + j % kWidth]);
  };
  for (int64_t j = 0; j < width; ++j) {
    double* const projected = a.projected + (i * a.size + known - width + j) * a.size;
    double* const leaving = a.leaving + (i * width + j) * width;
    const Real* const factor = room.factor + j * width;
    for (int64_t r = 0; r < known; ++r) {
      projected[r] = at(room.inside, j, r);
      for (int64_t l = 0; l <= j; ++l) projected[r] += factor[l] * at(room.again, l, r);
    }
    for (int64_t r = 0; r < width; ++r) {
      leaving[r] = 0;
      for (int64_t l = 0; l <= j; ++l) leaving[r] += double(factor[l]) * room.last[l * width + r];
    }
    for (int64_t k = 0; k < stride; ++k) basis[(known + j) * stride + k] = room.z[j * stride + k];
    Real* const q = static_cast<Real*>(a.q) + (i * width + j) * side;
    for (int64_t k = 0; k < side; ++k) q[k] = room.z[j * stride + k];
  }
}

template <class Real>
int64_t orthogonalise_range(const Lanczos& a, int64_t first, int64_t last, void* scratch) {
  const Leaving<Real> room(a, scratch);
  for (int64_t i = first; i < last; ++i) orthogonalise_one(a, i, room);
  return room.bytes;
}

// Matrices first ... last - 1; returns the bytes of scratch that any range needs.
int64_t orthogonalise(const Lanczos& a, int64_t first, int64_t last, void* scratch) {
  return a.wide ? orthogonalise_range<double>(a, first, last, scratch)
                : orthogonalise_range<float>(a, first, last, scratch);
}

}  // namespace samerge::SAMERGE_LEVEL
