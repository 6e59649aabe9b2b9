// Few rows against a large matrix: what counts is to read it once, while the arithmetic goes on. Either product multiplies
// kTall rows, number by number, with some vectors that all of them share, and keeps the sums in registers.
//
// rows W^T: a slab of W's rows is taken number by number, and a vector holds as many of the R rows. The slab's results are
// turned round in the end. rows W: the R rows are taken number by number, and a vector holds numbers of a row of W. They are read
// from memory, and widened, by the first kTall rows, which leave them in a panel for the others; every step fetches some of what
// comes next.
#pragma once

#include "../row_products.h"
#include "panel.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int kTall = 6;                                      // with two vectors AVX2's 16 registers, but for one
constexpr int kAbreast = SAMERGE_VECTOR_BYTES == 64 ? 4 : 2;  // vectors, at most
constexpr int64_t kSlabDepth = 512, kPanelDepth = 256;        // numbers of a sum that are added up in registers
constexpr int64_t kBlockRows = 96, kRegionColumns = 64;

// What is fetched meanwhile: a line every `every` steps, `stride` bytes apart.
struct Ahead {
  const char* place;
  int64_t stride, every;
};

// sums[i][j] += sum over k of factors[i][k] * vectors(k, j)
template <int kVectors, class Vector, class Vectors>
SAMERGE_INLINE void multiply(const lane_t<Vector>* const (&factors)[kTall], int64_t count, Ahead ahead,
                             const Vectors& vectors, Vector (&sums)[kTall][kVectors]) {
  const auto step = [&](int64_t k) SAMERGE_INLINE_BODY {
    Vector v[kVectors];
    for (int j = 0; j < kVectors; ++j) v[j] = vectors(k, j);
    for (int i = 0; i < kTall; ++i) {
      const lane_t<Vector> factor = factors[i][k];
      for (int j = 0; j < kVectors; ++j) sums[i][j] += v[j] * factor;
    }
  };
  int64_t k = 0;
  while (ahead.every && k + ahead.every <= count) {
    for (int64_t line = 0; line < kVectors * kBytes; line += 64) prefetch(ahead.place + line);
    ahead.place += ahead.stride;
    for (const int64_t end = k + ahead.every; k < end; ++k) step(k);
  }
  for (; k < count; ++k) step(k);
}

// Rows `first` ... first + kTall - 1 of `all`, the last one again past the end.
template <class Real>
SAMERGE_INLINE void point_to_rows(const Real* rows, int64_t stride, int64_t first, int64_t all,
                                  const Real* (&pointers)[kTall]) {
  for (int i = 0; i < kTall; ++i) pointers[i] = rows + (first + i < all ? first + i : all - 1) * stride;
}

// tile[i, c] += sum over k of factors[i][k] * x[k, c], kVectors vectors at c.
template <int kVectors, class Real>
void add_to_tile(const Real* const (&factors)[kTall], int64_t depth, const Real* x, int64_t x_stride, Real* tile) {
  using Vector = typename VectorOf<Real>::type;
  Vector sums[kTall][kVectors] = {};
  const auto read = [=](int64_t k, int j)
                        SAMERGE_INLINE_BODY { return load<Vector>(x + k * x_stride + j * kLanes<Vector>); };
  multiply<kVectors>(factors, depth, Ahead{}, read, sums);
  for (int i = 0; i < kTall; ++i)
    for (int j = 0; j < kVectors; ++j) {
      Real* const target = tile + i * kBlockRows + j * kLanes<Vector>;
      store(target, load<Vector>(target) + sums[i][j]);
    }
}

// out[:, slab] = rows W^T, one slab of W's rows after the other. Returns the bytes of scratch, at a multiple of 64.
template <class Real>
int64_t multiply_slabs(const RowProducts& a, int64_t first, int64_t last, void* scratch) {
  constexpr int64_t kTile = kSlabRows * kBlockRows;
  constexpr int kLanesOf = kLanes<typename VectorOf<Real>::type>;
  const auto read = reader(a.matrix_dtype, Real());
  const int64_t bytes = bytes_of(a.matrix_dtype);
  const bool in_place = bytes == sizeof(Real);
  Real *const tile = static_cast<Real*>(scratch), *const widened =
                                                      tile + kTile;  // [kSlabRows, kBlockRows], [kTall, kSlabDepth]
  for (int64_t slab = first; slab < last; ++slab) {
    const int64_t top = slab * kSlabRows, count = a.height - top < kSlabRows ? a.height - top : kSlabRows;
    const char* const matrix = static_cast<const char*>(a.matrix) + top * a.matrix_stride * bytes;
    for (int64_t block = 0; block < a.padded; block += kBlockRows) {
      const int64_t columns = a.padded - block < kBlockRows ? a.padded - block : kBlockRows;
      for (int64_t i = 0; i < kTile; ++i) tile[i] = 0;
      for (int64_t k = 0; k < a.width; k += kSlabDepth) {
        const int64_t depth = a.width - k < kSlabDepth ? a.width - k : kSlabDepth;
        const Real* const x = static_cast<const Real*>(a.rows) + k * a.padded + block;
        for (int64_t row = 0; row < count; row += kTall) {
          const Real* factors[kTall];
          if (in_place)
            point_to_rows(reinterpret_cast<const Real*>(matrix) + k, a.matrix_stride, row, count, factors);
          else
            for (int64_t i = 0; i < kTall; ++i) {
              const int64_t from = row + i < count ? row + i : count - 1;
              read(matrix + (from * a.matrix_stride + k) * bytes, depth, widened + i * kSlabDepth);
              factors[i] = widened + i * kSlabDepth;
            }
          Real* const target = tile + row * kBlockRows;
          int64_t c = 0;
          for (; c + kAbreast * kLanesOf <= columns; c += kAbreast * kLanesOf)
            add_to_tile<kAbreast>(factors, depth, x + c, a.padded, target + c);
          if (kAbreast == 4 && c + 3 * kLanesOf == columns) {
            add_to_tile<3>(factors, depth, x + c, a.padded, target + c);
            continue;
          }
          for (; c < columns; c += kLanesOf) add_to_tile<1>(factors, depth, x + c, a.padded, target + c);
        }
      }
      Real* const out = static_cast<Real*>(a.out) + top;
      for (int64_t r = block; r < block + columns && r < a.num_rows; ++r)
        for (int64_t i = 0; i < count; ++i) out[r * a.out_stride + i] = tile[i * kBlockRows + r - block];
    }
  }
  return (kTile + kTall * kSlabDepth) * int64_t(sizeof(Real));
}

// out[:, column ...] += rows W of `depth` rows of W from `top` on, in kVectors vectors of columns, of which `columns` count. ahead:
// where the same columns lie of what comes next.
template <int kVectors, class Storage>
void multiply_panel(const RowProducts& a, int64_t top, int64_t depth, int64_t column, int64_t columns,
                    const char* ahead, lane_t<typename Storage::Vector>* panel) {
  using Vector = typename Storage::Vector;
  using Real = lane_t<Vector>;
  using Stored = typename Storage::Stored;
  constexpr int64_t kColumns = kVectors * kLanes<Vector>;
  const auto* const matrix = static_cast<const Stored*>(a.matrix) + top * a.matrix_stride + column;
  const auto* const rows = static_cast<const Real*>(a.rows) + top;
  const bool whole = columns == kColumns;
  if (!whole)
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t c = columns; c < kColumns; ++c) panel[k * kColumns + c] = 0;
      Widen<Storage, Real>::read(matrix + k * a.matrix_stride, columns, panel + k * kColumns);
    }
  const auto again = [=](int64_t k, int j)
                         SAMERGE_INLINE_BODY { return load<Vector>(panel + k * kColumns + j * kLanes<Vector>); };
  const auto read = [=](int64_t k, int j) SAMERGE_INLINE_BODY {
    const Vector v = Storage::read(matrix + k * a.matrix_stride + j * kLanes<Vector>);
    store(panel + k * kColumns + j * kLanes<Vector>, v);
    return v;
  };
  const int64_t stride = a.matrix_stride * int64_t(sizeof(Stored)), blocks = (a.num_rows + kTall - 1) / kTall;
  for (int64_t row = 0; row < a.num_rows; row += kTall) {
    const Real* factors[kTall];
    point_to_rows(rows, a.row_stride, row, a.num_rows, factors);
    const int64_t from = depth * (row / kTall) / blocks, to = depth * (row / kTall + 1) / blocks;  // rows to fetch
    const Ahead fetched = {ahead + from * stride, stride, to > from ? depth / (to - from) : 0};
    Vector sums[kTall][kVectors] = {};
    if (row == 0 && whole)
      multiply<kVectors>(factors, depth, fetched, read, sums);
    else
      multiply<kVectors>(factors, depth, fetched, again, sums);
    for (int i = 0; i < kTall && row + i < a.num_rows; ++i) {
      Real* const out = static_cast<Real*>(a.out) + (row + i) * a.out_stride + column;
      for (int j = 0; j < kVectors; ++j) {
        if (whole) {
          store(out + j * kLanes<Vector>, load<Vector>(out + j * kLanes<Vector>) + sums[i][j]);
          continue;
        }
        Real lanes[kLanes<Vector>];
        store(lanes, sums[i][j]);
        for (int64_t c = 0; c < columns; ++c) out[c] += lanes[c];
      }
    }
  }
}

// out[:, unit] += rows W, of units first ... last - 1 of W's columns.
template <class Storage>
int64_t multiply_columns(const RowProducts& a, int64_t first, int64_t last, void* scratch) {
  using Vector = typename Storage::Vector;
  constexpr int64_t kLanesOf = kLanes<Vector>, kColumns = kAbreast * kLanesOf;
  const int64_t left = first * kUnitColumns, right = last * kUnitColumns < a.width ? last * kUnitColumns : a.width;
  auto* const panel = static_cast<lane_t<Vector>*>(scratch);  // [kPanelDepth, kColumns]
  const auto place = [&](int64_t row, int64_t column) {
    return reinterpret_cast<const char*>(static_cast<const typename Storage::Stored*>(a.matrix) +
                                         row * a.matrix_stride + column);
  };
  for (int64_t top = 0; top < a.height && left < right; top += kPanelDepth) {
    const int64_t depth = a.height - top < kPanelDepth ? a.height - top : kPanelDepth;
    for (int64_t region = left; region < right; region += kRegionColumns) {
      const int64_t next = region + kRegionColumns, end = next < right ? next : right;
      const char* const ahead = next < right                        ? place(top, next)
                                : top + 2 * kPanelDepth <= a.height ? place(top + kPanelDepth, left)
                                                                    : place(top, region);
      for (int64_t c = region; c < end;) {
        const char* const of_c = ahead + (c - region) * int64_t(sizeof(typename Storage::Stored));
        if (c + kColumns <= end) {
          multiply_panel<kAbreast, Storage>(a, top, depth, c, kColumns, of_c, panel);
          c += kColumns;
        } else {
          const int64_t columns = end - c < kLanesOf ? end - c : kLanesOf;
          multiply_panel<1, Storage>(a, top, depth, c, columns, of_c, panel);
          c += columns;
        }
      }
    }
  }
  return kPanelDepth * kColumns * int64_t(sizeof(lane_t<Vector>));
}

int64_t rows_times_transposed(const RowProducts& a, int64_t first, int64_t last, void* scratch) {
  return a.matrix_dtype == DType::f64 ? multiply_slabs<double>(a, first, last, scratch)
                                      : multiply_slabs<float>(a, first, last, scratch);
}

int64_t add_rows_times(const RowProducts& a, int64_t first, int64_t last, void* scratch) {
  switch (a.matrix_dtype) {
    case DType::f32: return multiply_columns<F32>(a, first, last, scratch);
    case DType::bf16: return multiply_columns<BF16>(a, first, last, scratch);
    case DType::f16: return multiply_columns<F16>(a, first, last, scratch);
    default: return multiply_columns<F64>(a, first, last, scratch);
  }
}

}  // namespace samerge::SAMERGE_LEVEL
