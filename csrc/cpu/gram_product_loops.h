// A chunk is taken panel by panel, and both products while the panel is in the cache. Of a tall matrix a panel is some
// whole rows W_p: y = q W_p^T, then z += y W_p; of a wide one some columns: y = q W_p, then z += y W_p^T. Either way
// one product sums along the rows of the panel (dot) and the other down its columns (accumulate), for eight vectors of
// q at a time where there are as many, else for four. Numbers that need no widening are multiplied where they lie.
#pragma once

#include "../gram_product.h"
#include "panel.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int64_t kPanelBytes = 128 * 1024;

template <class Real>
constexpr int64_t kRealLanes = kLanes<typename VectorOf<Real>::type>;

template <class Real>
SAMERGE_INLINE int64_t padded(int64_t n) {
  return (n + kRealLanes<Real> - 1) / kRealLanes<Real> * kRealLanes<Real>;
}

// A vector of partial sums of four products, kColumns lanes to each: q is packed so that kColumns numbers of each of
// four vectors are one vector, [kWidth, kColumns], which is multiplied with as many numbers of a row, repeated. So a
// product along a row ends in few sums of lanes.
template <class Real>
struct Packed {
  static constexpr int kColumns = kRealLanes<Real> > kWidth ? kRealLanes<Real> / kWidth : 1;
  static constexpr int kNumbers = kWidth * kColumns;
  typedef Real Vector __attribute__((vector_size(kNumbers * sizeof(Real))));

  // factor * vector [n] as vector j of its four.
  static SAMERGE_INLINE void pack(const Real* vector, int64_t n, Real factor, Real* packed, int64_t j) {
    packed += j * kColumns;
    for (int64_t c = 0; c < n / kColumns; ++c)
      for (int i = 0; i < kColumns; ++i) packed[c * kNumbers + i] = factor * vector[c * kColumns + i];
    for (int64_t c = n / kColumns * kColumns; c < n; ++c)
      packed[c / kColumns * kNumbers + c % kColumns] = factor * vector[c];
  }
};

SAMERGE_INLINE Packed<float>::Vector repeat(const float* x) {
#if SAMERGE_VECTOR_BYTES == 64
  return (Packed<float>::Vector)_mm512_broadcast_f32x4(_mm_loadu_ps(x));
#elif SAMERGE_VECTOR_BYTES == 32
  return (Packed<float>::Vector)_mm256_broadcast_sd(reinterpret_cast<const double*>(x));
#else
  return Packed<float>::Vector{x[0], x[0], x[0], x[0]};
#endif
}

SAMERGE_INLINE Packed<double>::Vector repeat(const double* x) {
#if SAMERGE_VECTOR_BYTES == 64
  return (Packed<double>::Vector)_mm512_broadcast_f64x2(_mm_loadu_pd(x));
#else
  return Packed<double>::Vector{x[0], x[0], x[0], x[0]};
#endif
}

// Part of a matrix, whole vectors a row, in a panel or where it lies; `ahead` numbers further lies the part that comes
// next, which is fetched from memory meanwhile: its first half by dot and its second by accumulate, so that the memory
// is always at work.
template <class Real>
struct Rows {
  const Real* numbers;
  int64_t stride, ahead;
  SAMERGE_INLINE const Real* operator[](int64_t r) const { return numbers + r * stride; }
};

// out[g, r, j] += panel[r] . x[g, j] for kRows rows and kGroups groups of kWidth vectors.
template <int kRows, int kGroups, class Real>
SAMERGE_INLINE void dot_rows(Rows<Real> panel, int64_t columns, const Real* x, int64_t x_group, Real* out,
                             int64_t out_group) {
  using Vector = typename Packed<Real>::Vector;
  constexpr int kColumns = Packed<Real>::kColumns;
  Vector sums[kRows][kGroups] = {};
  for (int64_t c = 0; c < columns; c += kColumns) {
    Vector v[kGroups];
    for (int g = 0; g < kGroups; ++g) v[g] = load<Vector>(x + g * x_group + c * kWidth);
    if (kRows > 1) prefetch(panel[c / kColumns % (kRows / 2)] + c + panel.ahead);
    for (int r = 0; r < kRows; ++r) {
      const Vector w = repeat(panel[r] + c);
      for (int g = 0; g < kGroups; ++g) sums[r][g] += w * v[g];
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    alignas(64) Real lanes[kRows * Packed<Real>::kNumbers];
    for (int r = 0; r < kRows; ++r) store(lanes + r * Packed<Real>::kNumbers, sums[r][g]);
    Real* const target = out + g * out_group;
    for (int i = 0; i < kRows * kWidth; ++i) {
      const Real* some = lanes + i * kColumns;
      target[i] += kColumns == 4   ? (some[0] + some[1]) + (some[2] + some[3])
                   : kColumns == 2 ? some[0] + some[1]
                                   : some[0];
    }
  }
}

// out[g, r, j] += panel[r] . x[g, j]: [rows, columns], packed x -> [kGroups, rows, kWidth]
template <int kGroups, class Real>
void dot(Rows<Real> panel, int64_t rows, int64_t columns, const Real* x, int64_t x_group, Real* out,
         int64_t out_group) {
  constexpr int kRows = SAMERGE_VECTOR_BYTES == 64 ? 8 : 4;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    dot_rows<kRows, kGroups>({panel[r], panel.stride, panel.ahead - r / 2 * panel.stride}, columns, x, x_group,
                             out + r * kWidth, out_group);
  for (; r < rows; ++r)
    dot_rows<1, kGroups>({panel[r], panel.stride, 0}, columns, x, x_group, out + r * kWidth, out_group);
}

template <int kVectors, int kGroups, class Real>
SAMERGE_INLINE void accumulate_columns(Rows<Real> panel, int64_t rows, const Real* coefficients,
                                       int64_t coefficient_group, Real* out, int64_t out_stride) {
  using Vector = typename VectorOf<Real>::type;
  constexpr int kTogether = kGroups * kWidth;
  Vector sums[kTogether][kVectors] = {};  // of this panel alone: long sums are added in two levels
  for (int64_t r = 0; r < rows; ++r) {
    if (r % 2)
      for (int v = 0; v < kVectors; ++v) prefetch(panel[(rows + r) / 2] + v * kLanes<Vector> + panel.ahead);
    Vector w[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      w[v] = load<Vector>(panel[r] + v * kLanes<Vector>);
    }
    for (int j = 0; j < kTogether; ++j) {
      const Real c = coefficients[j / kWidth * coefficient_group + r * kWidth + j % kWidth];
      for (int v = 0; v < kVectors; ++v) sums[j][v] += w[v] * c;
    }
  }
  for (int j = 0; j < kTogether; ++j)
    for (int v = 0; v < kVectors; ++v) {
      Real* const target = out + j * out_stride + v * kLanes<Vector>;
      store(target, load<Vector>(target) + sums[j][v]);
    }
}

// out[j] += sum over r of coefficients[g, r, j] * panel[r]:
// [rows, columns], [kGroups, rows, kWidth] -> [kGroups * kWidth, columns]
template <int kGroups, class Real>
void accumulate(Rows<Real> panel, int64_t rows, int64_t columns, const Real* coefficients, int64_t coefficient_group,
                Real* out, int64_t out_stride) {
  constexpr int kVectors = SAMERGE_VECTOR_BYTES == 64 ? 3 : 1;
  constexpr int64_t kSome = kVectors * kRealLanes<Real>;
  int64_t c = 0;
  for (; c + kSome <= columns; c += kSome)
    accumulate_columns<kVectors, kGroups>({panel[0] + c, panel.stride, panel.ahead}, rows, coefficients,
                                          coefficient_group, out + c, out_stride);
  for (; c < columns; c += kRealLanes<Real>)
    accumulate_columns<1, kGroups>({panel[0] + c, panel.stride, panel.ahead}, rows, coefficients, coefficient_group,
                                   out + c, out_stride);
}

// The part of scale * (base + matrix), in `room`; or, in place, of the matrix itself, not scaled.
template <class Real>
Rows<Real> read_panel(const Source<Real>& source, bool in_place, Real scale, int64_t row, int64_t rows, int64_t column,
                      int64_t columns, int64_t ahead, Real* room, Real* other) {
  if (in_place) {
    const auto* numbers = reinterpret_cast<const Real*>(source.matrix) + row * source.matrix_stride + column;
    return {numbers, source.matrix_stride, ahead};
  }
  const int64_t stride = padded<Real>(columns);
  for (int64_t r = 0; r < rows; ++r) {
    Real* target = room + r * stride;
    source.read(row + r, column, columns, target, other);
    for (int64_t c = 0; c < columns; ++c) target[c] *= scale;
    for (int64_t c = columns; c < stride; ++c) target[c] = 0;
  }
  return {room, stride, 0};
}

// What one thread works in; vectors along the rows of a panel are packed for dot, plain from accumulate; those down its
// columns are [rows, kWidth].
template <class Real>
struct Room {
  int64_t panel_size, stride,
      group;  // numbers along the longer side of a panel; of a padded panel row; of a group of q or z
  Real *panel, *other, *q, *z, *y, *plain_y;
  int64_t bytes;

  Room(const GramProduct& a, void* scratch) {
    const int64_t fit = kPanelBytes / int64_t(sizeof(Real)) / (a.side() ? a.side() : 1), lanes = kRealLanes<Real>;
    panel_size = fit < 32 ? 32 : fit > 512 ? 512 : fit / 8 * 8;
    if (!a.tall()) panel_size = panel_size < 6 * lanes ? 6 * lanes : panel_size / (3 * lanes) * (3 * lanes);
    stride = a.tall() ? padded<Real>(a.columns) : panel_size;
    group = kWidth * (a.tall() ? stride : a.rows);
    auto* next = static_cast<char*>(scratch);
    const auto take = [&](int64_t numbers) {
      auto* taken = reinterpret_cast<Real*>(next);
      next += (numbers * int64_t(sizeof(Real)) + 63) / 64 * 64;
      return taken;
    };
    panel = take(a.tall() ? panel_size * stride : a.rows * panel_size);
    other = take(stride);
    q = take(a.width / kWidth * group);
    z = take(a.width / kWidth * group);
    y = take(2 * kWidth * panel_size);
    plain_y = take(2 * kWidth * panel_size);
    bytes = next - static_cast<char*>(scratch);
  }
};

// Both products of a panel with kGroups groups of vectors.
template <int kGroups, class Real>
void multiply_panel(const GramProduct& a, const Room<Real>& room, Rows<Real> panel, int64_t count, Real factor,
                    const Real* q, Real* z) {
  const int64_t columns = a.tall() ? room.stride : padded<Real>(count), y_group = kWidth * room.panel_size;
  if (a.tall()) {
    for (int64_t k = 0; k < kGroups * y_group; ++k) room.y[k] = 0;
    dot<kGroups>(panel, count, columns, q, room.group, room.y, y_group);
    for (int64_t k = 0; k < kGroups * y_group; ++k) room.y[k] *= factor;
    accumulate<kGroups>(panel, count, columns, room.y, y_group, z, room.stride);
    return;
  }
  for (int64_t k = 0; k < kGroups * y_group; ++k) room.plain_y[k] = 0;
  accumulate<kGroups>(panel, a.rows, columns, q, room.group, room.plain_y, room.panel_size);
  for (int64_t j = 0; j < kGroups * kWidth; ++j)
    Packed<Real>::pack(room.plain_y + j * room.panel_size, columns, factor, room.y + j / kWidth * y_group, j % kWidth);
  dot<kGroups>(panel, a.rows, columns, room.y, y_group, z, room.group);
}

template <class Real>
void multiply_chunk(const GramProduct& a, int64_t unit, const Room<Real>& room) {
  const bool tall = a.tall();
  const int64_t i = unit / a.chunks, side = a.side(), longer = tall ? a.rows : a.columns;
  const int64_t begin = unit % a.chunks * a.chunk, end = begin + a.chunk < longer ? begin + a.chunk : longer;
  const Real* q = static_cast<const Real*>(a.q) + i * a.width * side;
  const Source<Real> source(a, i);
  for (int64_t k = 0; k < a.width / kWidth * room.group; ++k) room.q[k] = room.z[k] = 0;
  for (int64_t j = 0; j < a.width; ++j) {
    Real* const target = room.q + j / kWidth * room.group;
    if (tall)
      Packed<Real>::pack(q + j * side, side, Real(1), target, j % kWidth);
    else
      for (int64_t k = 0; k < side; ++k) target[k * kWidth + j % kWidth] = q[j * side + k];
  }

  const Real scale = a.scale[i];  // in place it is put on y, twice, where that can neither overflow nor vanish
  const bool plain = !a.bases && bytes_of(a.matrix_dtype) == sizeof(Real) && scale > Real(1e-9) && scale < Real(1e9);
  for (int64_t first = begin; first < end; first += room.panel_size) {
    const int64_t count = end - first < room.panel_size ? end - first : room.panel_size;
    const int64_t columns = tall ? a.columns : count;
    const bool in_place = plain && columns % kRealLanes<Real> == 0;
    const int64_t row = tall ? first : 0, rows = tall ? count : a.rows, column = tall ? 0 : first;
    const int64_t ahead = tall ? count * a.matrix_stride : count;
    const auto panel =
        read_panel<Real>(source, in_place, scale, row, rows, column, columns, ahead, room.panel, room.other);
    const Real factor = in_place ? scale * scale : Real(1);
    int64_t g = 0;
    for (; g + 2 <= a.width / kWidth; g += 2)
      multiply_panel<2>(a, room, panel, count, factor, room.q + g * room.group, room.z + g * room.group);
    if (g < a.width / kWidth)
      multiply_panel<1>(a, room, panel, count, factor, room.q + g * room.group, room.z + g * room.group);
  }
  Real* z = static_cast<Real*>(a.partials) + unit * a.width * side;
  for (int64_t j = 0; j < a.width; ++j) {
    const Real* const source = tall ? room.z + j * room.stride : room.z + j / kWidth * room.group + j % kWidth;
    const int64_t apart = tall ? 1 : kWidth;
    for (int64_t k = 0; k < side; ++k) z[j * side + k] = source[k * apart];
  }
}

template <class Real>
int64_t multiply_chunks(const GramProduct& a, int64_t first, int64_t last, void* scratch) {
  const Room<Real> room(a, scratch);
  for (int64_t unit = first; unit < last; ++unit) multiply_chunk(a, unit, room);
  return room.bytes;
}

// Chunks first ... last - 1 of all matrices; returns the bytes of scratch that any range needs.
int64_t gram_product(const GramProduct& a, int64_t first, int64_t last, void* scratch) {
  return a.wide ? multiply_chunks<double>(a, first, last, scratch) : multiply_chunks<float>(a, first, last, scratch);
}

}  // namespace samerge::SAMERGE_LEVEL
