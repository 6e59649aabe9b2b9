// A chunk is read panel by panel, and both products are taken while the panel is in the cache. Of a tall matrix a panel
// is some whole rows W_p: y = q W_p^T, then z += y W_p; of a wide one some columns: y = q W_p, then z += y W_p^T.
// Either way one product sums along the rows of the panel (dot) and the other down its columns (accumulate), four
// vectors of q at a time.
#pragma once

#include "../gram_product.h"
#include "panel.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int64_t kPanelBytes = 1024 * 1024;

template <class Real>
constexpr int64_t kRealLanes = kLanes<typename VectorOf<Real>::type>;

template <class Real>
SAMERGE_INLINE int64_t padded(int64_t n) {
  return (n + kRealLanes<Real> - 1) / kRealLanes<Real> * kRealLanes<Real>;
}

// The sum of the lanes, by halves: a product along a row ends in one, and there are many short rows.
template <class Vector>
SAMERGE_INLINE lane_t<Vector> add_lanes(Vector v) {
  using Real = lane_t<Vector>;
  Real lanes[kLanes<Vector>];
  store(lanes, v);
  for (int half = kLanes<Vector> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// out[r, j] += panel[r] . x[j] for kRows rows and kWidth vectors.
template <int kRows, class Real>
SAMERGE_INLINE void dot_rows(const Real* panel, int64_t columns, const Real* x, Real* out) {
  using Vector = typename VectorOf<Real>::type;
  Vector sums[kRows][kWidth] = {};
  for (int64_t c = 0; c < columns; c += kLanes<Vector>) {
    Vector v[kWidth];
    for (int j = 0; j < kWidth; ++j) v[j] = load<Vector>(x + j * columns + c);
    for (int r = 0; r < kRows; ++r) {
      const Vector w = load<Vector>(panel + r * columns + c);
      for (int j = 0; j < kWidth; ++j) sums[r][j] += w * v[j];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kWidth; ++j) out[r * kWidth + j] += add_lanes(sums[r][j]);
}

// out[r, j] += panel[r] . x[j]: [rows, columns], [kWidth, columns] -> [rows, kWidth]
template <class Real>
void dot(const Real* panel, int64_t rows, int64_t columns, const Real* x, Real* out) {
  constexpr int kRows = SAMERGE_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dot_rows<kRows>(panel + r * columns, columns, x, out + r * kWidth);
  for (; r < rows; ++r) dot_rows<1>(panel + r * columns, columns, x, out + r * kWidth);
}

template <int kVectors, class Real>
SAMERGE_INLINE void accumulate_columns(const Real* panel, int64_t rows, int64_t columns, const Real* coefficients,
                                       Real* out) {
  using Vector = typename VectorOf<Real>::type;
  Vector sums[kWidth][kVectors] = {};  // of this panel alone: long sums are added in two levels
  for (int64_t r = 0; r < rows; ++r) {
    Vector w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = load<Vector>(panel + r * columns + v * kLanes<Vector>);
    for (int j = 0; j < kWidth; ++j) {
      const Vector c = broadcast<Vector>(coefficients[r * kWidth + j]);
      for (int v = 0; v < kVectors; ++v) sums[j][v] += w[v] * c;
    }
  }
  for (int j = 0; j < kWidth; ++j)
    for (int v = 0; v < kVectors; ++v) {
      Real* const target = out + j * columns + v * kLanes<Vector>;
      store(target, load<Vector>(target) + sums[j][v]);
    }
}

// out[j] += sum over r of coefficients[r, j] * panel[r]: [rows, columns], [rows, kWidth] -> [kWidth, columns]
template <class Real>
void accumulate(const Real* panel, int64_t rows, int64_t columns, const Real* coefficients, Real* out) {
  constexpr int kVectors = SAMERGE_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t c = 0;
  for (; c + kVectors * kRealLanes<Real> <= columns; c += kVectors * kRealLanes<Real>)
    accumulate_columns<kVectors>(panel + c, rows, columns, coefficients, out + c);
  for (; c < columns; c += kRealLanes<Real>) accumulate_columns<1>(panel + c, rows, columns, coefficients, out + c);
}

template <class Real>
void read_panel(const Source<Real>& source, Real scale, int64_t row, int64_t rows, int64_t column, int64_t columns,
                Real* panel, Real* other) {
  const int64_t stride = padded<Real>(columns);
  for (int64_t r = 0; r < rows; ++r) {
    Real* target = panel + r * stride;
    source.read(row + r, column, columns, target, other);
    for (int64_t c = 0; c < columns; ++c) target[c] *= scale;
    for (int64_t c = columns; c < stride; ++c) target[c] = 0;
  }
}

// What one thread works in; the vectors of q and z in groups of kWidth.
template <class Real>
struct Room {
  int64_t panel_size, stride,
      group;  // numbers along the longer side of a panel; of a padded panel row; of a group of q or z
  Real *panel, *other, *q, *z, *y;
  int64_t bytes;

  Room(const GramProduct& a, void* scratch) {
    const int64_t fit = kPanelBytes / int64_t(sizeof(Real)) / (a.side() ? a.side() : 1), lanes = kRealLanes<Real>;
    panel_size = fit < 8 ? 8 : a.tall() && fit > 64 ? 64 : fit > 512 ? 512 : fit;
    if (!a.tall()) panel_size = panel_size < 4 * lanes ? 4 * lanes : panel_size / lanes * lanes;
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
    y = take(kWidth * panel_size);
    bytes = next - static_cast<char*>(scratch);
  }
};

template <class Real>
void multiply_chunk(const GramProduct& a, int64_t unit, const Room<Real>& room) {
  const int64_t i = unit / a.chunks, side = a.side(), longer = a.tall() ? a.rows : a.columns;
  const int64_t begin = unit % a.chunks * a.chunk, end = begin + a.chunk < longer ? begin + a.chunk : longer;
  const Real* q = static_cast<const Real*>(a.q) + i * a.width * side;
  const Source<Real> source(a, i);
  // Vector j of a group lies along the panel's rows, [kWidth, stride], or down its columns, [rows, kWidth].
  const auto place = [&](int64_t j, int64_t k) {
    return j / kWidth * room.group + (a.tall() ? j % kWidth * room.stride + k : k * kWidth + j % kWidth);
  };
  for (int64_t k = 0; k < a.width / kWidth * room.group; ++k) room.q[k] = room.z[k] = 0;
  for (int64_t j = 0; j < a.width; ++j)
    for (int64_t k = 0; k < side; ++k) room.q[place(j, k)] = q[j * side + k];

  for (int64_t first = begin; first < end; first += room.panel_size) {
    const int64_t count = end - first < room.panel_size ? end - first : room.panel_size;
    const int64_t columns = a.tall() ? room.stride : padded<Real>(count);
    if (a.tall())
      read_panel<Real>(source, a.scale[i], first, count, 0, a.columns, room.panel, room.other);
    else
      read_panel<Real>(source, a.scale[i], 0, a.rows, first, count, room.panel, room.other);
    for (int64_t g = 0; g < a.width / kWidth * room.group; g += room.group) {
      for (int64_t k = 0; k < kWidth * room.panel_size; ++k) room.y[k] = 0;
      if (a.tall()) {
        dot(room.panel, count, columns, room.q + g, room.y);
        accumulate(room.panel, count, columns, room.y, room.z + g);
      } else {
        accumulate(room.panel, a.rows, columns, room.q + g, room.y);
        dot(room.panel, a.rows, columns, room.y, room.z + g);
      }
    }
  }
  Real* z = static_cast<Real*>(a.partials) + unit * a.width * side;
  for (int64_t j = 0; j < a.width; ++j)
    for (int64_t k = 0; k < side; ++k) z[j * side + k] = room.z[place(j, k)];
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
