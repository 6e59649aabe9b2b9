// A panel: part of a matrix, widened (and scaled, and added to its base) into memory that stays in the second-level
// cache, its rows padded with zeros to whole vectors. Read once, multiplied many times, whatever the dtype of storage.
#pragma once

#include "simd.h"

namespace samerge::SAMERGE_LEVEL {

template <class Real>
struct VectorOf {
  using type = Float;
};
template <>
struct VectorOf<double> {
  using type = Double;
};

// n numbers as Real; past the last whole vector one at a time, so nothing is read behind them.
template <class Storage, class Real>
struct Widen;

template <class Storage>
struct Widen<Storage, lane_t<typename Storage::Vector>> {
  using Real = lane_t<typename Storage::Vector>;
  static void read(const void* source, int64_t n, Real* target) {
    using Vector = typename Storage::Vector;
    using Stored = typename Storage::Stored;
    const auto* numbers = static_cast<const Stored*>(source);
    int64_t i = 0;
    for (; i + kLanes<Vector> <= n; i += kLanes<Vector>) store(target + i, Storage::read(numbers + i));
    if (i == n) return;
    Stored rest[kLanes<Vector>] = {};
    Real wide[kLanes<Vector>];
    for (int64_t k = 0; i + k < n; ++k) rest[k] = numbers[i + k];
    store(wide, Storage::read(rest));
    for (int64_t k = 0; i + k < n; ++k) target[i + k] = wide[k];
  }
};

template <class Storage>
struct WidenTwice {
  static void read(const void* source, int64_t n, double* target) {
    constexpr int64_t kSome = 256;
    alignas(64) float some[kSome];
    const auto* numbers = static_cast<const typename Storage::Stored*>(source);
    for (int64_t begin = 0; begin < n; begin += kSome) {
      const int64_t count = n - begin < kSome ? n - begin : kSome;
      Widen<Storage, float>::read(numbers + begin, count, some);
      for (int64_t i = 0; i < count; ++i) target[begin + i] = some[i];
    }
  }
};
template <>
struct Widen<F32, double> : WidenTwice<F32> {};
template <>
struct Widen<BF16, double> : WidenTwice<BF16> {};
template <>
struct Widen<F16, double> : WidenTwice<F16> {};

template <class Real>
using Reader = void (*)(const void*, int64_t, Real*);

inline Reader<float> reader(DType dtype, float) {
  constexpr Reader<float> of[] = {Widen<F32, float>::read, Widen<BF16, float>::read, Widen<F16, float>::read, nullptr};
  return of[int(dtype)];
}

inline Reader<double> reader(DType dtype, double) {
  constexpr Reader<double> of[] = {Widen<F32, double>::read, Widen<BF16, double>::read, Widen<F16, double>::read,
                                   Widen<F64, double>::read};
  return of[int(dtype)];
}

SAMERGE_INLINE int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Rows of one matrix, with those of its base added where it has one.
template <class Real>
struct Source {
  const char *matrix, *base;
  int64_t matrix_stride, base_stride, matrix_bytes, base_bytes;
  Reader<Real> read_matrix, read_base;

  template <class Call>
  Source(const Call& a, int64_t i)
      : matrix(static_cast<const char*>(a.matrices[i])),
        base(a.bases ? static_cast<const char*>(a.bases[i]) : nullptr),
        matrix_stride(a.matrix_stride),
        base_stride(a.base_stride),
        matrix_bytes(bytes_of(a.matrix_dtype)),
        base_bytes(bytes_of(a.base_dtype)),
        read_matrix(reader(a.matrix_dtype, Real())),
        read_base(reader(a.base_dtype, Real())) {}

  // target[0 ... n) = numbers `column` ... of a row; `other` is room for n more.
  void read(int64_t row, int64_t column, int64_t n, Real* target, Real* other) const {
    read_matrix(matrix + (row * matrix_stride + column) * matrix_bytes, n, target);
    if (!base) return;
    read_base(base + (row * base_stride + column) * base_bytes, n, other);
    for (int64_t i = 0; i < n; ++i) target[i] += other[i];
  }
};

}  // namespace samerge::SAMERGE_LEVEL
