// Vectors of one instruction level, in GCC's and clang's vector extensions: the one source of the arithmetic. A Float is
// SAMERGE_VECTOR_BYTES of floats, a Double the same number of bytes of doubles. Loops are templates over a storage type
// (F32, BF16, F16, F64), which reads and writes whole vectors of the type that it is computed in.
#pragma once

#include "../dtype.h"

#define SAMERGE_INLINE inline __attribute__((always_inline))
#include "../softmax_kl_math.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int kBytes = SAMERGE_VECTOR_BYTES;

typedef float Float __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kBytes / 2)));
typedef double Double __attribute__((vector_size(kBytes)));

template <class Vector>
struct Lane;
template <>
struct Lane<Float> {
  using type = float;
};
template <>
struct Lane<Double> {
  using type = double;
};
template <class Vector>
using lane_t = typename Lane<Vector>::type;

template <class Vector>
constexpr int kLanes = kBytes / sizeof(lane_t<Vector>);

template <class Vector>
SAMERGE_INLINE Vector load(const void* source) {
  Vector v;
  __builtin_memcpy(&v, source, sizeof(v));
  return v;
}

template <class Vector>
SAMERGE_INLINE void store(void* target, Vector v) {
  __builtin_memcpy(target, &v, sizeof(v));
}

template <class Vector>
SAMERGE_INLINE Vector broadcast(lane_t<Vector> x) {
  return Vector{} + x;
}

template <class Vector>
SAMERGE_INLINE Vector max(Vector a, Vector b) {  // b where a is NaN
  return a > b ? a : b;
}

template <class Vector>
SAMERGE_INLINE double sum(Vector v) {
  double total = 0;
  for (int lane = 0; lane < kLanes<Vector>; ++lane) total += v[lane];
  return total;
}

template <class Vector>
SAMERGE_INLINE lane_t<Vector> max_lane(Vector v) {
  lane_t<Vector> largest = v[0];
  for (int lane = 1; lane < kLanes<Vector>; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

// exp(x) for x <= 88, within 2 ulp; 0 below -87.3 (the smallest normal number) and at -inf; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2, and a polynomial in r (Cephes expf).
SAMERGE_INLINE Float exp(Float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Float shifted = x * 1.44269504088896341f + kRound;
  const Float n = shifted - kRound;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first product exact
  Float y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.f);
  const Float scale = (Float)(((Bits)shifted << 23) + (127u << 23));
  return x < -87.33654f ? Float{} : y * scale;
}

SAMERGE_INLINE Double exp(Double x) {
  for (int lane = 0; lane < kLanes<Double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

// exp(-d) - 1 + d, where it is small.
SAMERGE_INLINE Float exp_remainder(Float d) { return exp_remainder_series(d); }

SAMERGE_INLINE Double exp_remainder(Double d) {
  for (int lane = 0; lane < kLanes<Double>; ++lane) d[lane] += __builtin_expm1(-d[lane]);
  return d;
}

struct F32 {
  using Stored = float;
  using Vector = Float;
  static SAMERGE_INLINE Float read(const float* p) { return load<Float>(p); }
  static SAMERGE_INLINE void write(float* p, Float v) { store(p, v); }
};

struct F64 {
  using Stored = double;
  using Vector = Double;
  static SAMERGE_INLINE Double read(const double* p) { return load<Double>(p); }
  static SAMERGE_INLINE void write(double* p, Double v) { store(p, v); }
};

// Writes round to the nearest, ties to even; NaN stays NaN.
struct BF16 {
  using Stored = uint16_t;
  using Vector = Float;
  static SAMERGE_INLINE Float read(const uint16_t* p) {
    return (Float)(__builtin_convertvector(load<HalfBits>(p), Bits) << 16);
  }
  static SAMERGE_INLINE void write(uint16_t* p, Float v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    store(p, __builtin_convertvector(v != v ? Bits{} + 0x7fc0u : rounded, HalfBits));
  }
};

struct F16 {
  using Stored = uint16_t;
  using Vector = Float;
#if SAMERGE_VECTOR_BYTES == 64
  static SAMERGE_INLINE Float read(const uint16_t* p) { return (Float)_mm512_cvtph_ps(load<__m256i>(p)); }
  static SAMERGE_INLINE void write(uint16_t* p, Float v) {
    store(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif SAMERGE_VECTOR_BYTES == 32
  static SAMERGE_INLINE Float read(const uint16_t* p) { return (Float)_mm256_cvtph_ps(load<__m128i>(p)); }
  static SAMERGE_INLINE void write(uint16_t* p, Float v) {
    store(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static SAMERGE_INLINE Float read(const uint16_t* p) {
    const Bits half = __builtin_convertvector(load<HalfBits>(p), Bits);
    const Float magnitude = (Float)((half & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormals included
    const Bits special = (Bits)(magnitude >= 65536.f) & 0x7f800000u;     // inf and NaN
    return (Float)((Bits)magnitude | special | ((half & 0x8000u) << 16));
  }
  static SAMERGE_INLINE void write(uint16_t* p, Float v) {
    const Bits sign = (Bits)v & 0x80000000u;
    const Float magnitude = (Float)((Bits)v ^ sign);
    const Bits bits = (Bits)magnitude;
    const Bits normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const Bits subnormal = (Bits)(magnitude + 0.5f) - 0x3f000000u;  // the addition shifts and rounds
    Bits half = magnitude < 0x1p-14f ? subnormal : normal;
    half = magnitude >= 65536.f ? Bits{} + 0x7c00u : half;
    half = v != v ? Bits{} + 0x7e00u : half;
    store(p, __builtin_convertvector(half | (sign >> 16), HalfBits));
  }
#endif
};

}  // namespace samerge::SAMERGE_LEVEL
