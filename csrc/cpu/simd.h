// Vectors of one instruction level, in GCC's and clang's vector extensions: the one source of the arithmetic. A Float is
// SAMERGE_VECTOR_BYTES of floats, a Double the same number of bytes of doubles. Loops are templates over a storage type
// (F32, BF16, F16, F64), which reads whole vectors of the type that it is computed in and rounds them to what it stores.
#pragma once

#include "../dtype.h"

#define SAMERGE_INLINE inline __attribute__((always_inline))
#define SAMERGE_INLINE_BODY __attribute__((always_inline))  // of a lambda
#include "../softmax_kl_math.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int kBytes = SAMERGE_VECTOR_BYTES;

typedef float Float __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kBytes / 2)));
typedef float HalfFloat __attribute__((vector_size(kBytes / 2)));
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

// Stores past the caches, to an address aligned to the vector, for results too large to be found there again; fence() makes
// them visible to other threads. The portable level stores as usual.
#if SAMERGE_VECTOR_BYTES == 64
SAMERGE_INLINE void stream(void* target, Float v) { _mm512_stream_ps((float*)target, (__m512)v); }
SAMERGE_INLINE void stream(void* target, Double v) { _mm512_stream_pd((double*)target, (__m512d)v); }
SAMERGE_INLINE void stream(void* target, HalfBits v) { _mm256_stream_si256((__m256i*)target, (__m256i)v); }
SAMERGE_INLINE void fence() { _mm_sfence(); }
#elif SAMERGE_VECTOR_BYTES == 32
SAMERGE_INLINE void stream(void* target, Float v) { _mm256_stream_ps((float*)target, (__m256)v); }
SAMERGE_INLINE void stream(void* target, Double v) { _mm256_stream_pd((double*)target, (__m256d)v); }
SAMERGE_INLINE void stream(void* target, HalfBits v) { _mm_stream_si128((__m128i*)target, (__m128i)v); }
SAMERGE_INLINE void fence() { _mm_sfence(); }
#else
template <class Vector>
SAMERGE_INLINE void stream(void* target, Vector v) {
  store(target, v);
}
SAMERGE_INLINE void fence() {}
#endif

// Into the second-level cache.
SAMERGE_INLINE void prefetch(const void* place) { __builtin_prefetch(place, 0, 2); }

template <class Vector>
SAMERGE_INLINE Vector broadcast(lane_t<Vector> x) {
  return Vector{} + x;
}

template <class Vector>
SAMERGE_INLINE Vector max(Vector a, Vector b) {  // b where a is NaN
  return a > b ? a : b;
}

// The last `count` lanes, moved to the front, with `fill` after them.
template <class Vector>
SAMERGE_INLINE Vector last_lanes(Vector v, int count, lane_t<Vector> fill) {
  constexpr int kCount = kLanes<Vector>;
#ifdef __clang__
  Vector moved;
  for (int lane = 0; lane < kCount; ++lane) moved[lane] = lane < count ? v[kCount - count + lane] : fill;
  return moved;
#else
  decltype(v < v) lane;
  for (int i = 0; i < kCount; ++i) lane[i] = i;
  return lane < count ? __builtin_shuffle(v, lane + (kCount - count)) : broadcast<Vector>(fill);
#endif
}

template <class Vector>
struct Halves {
  Vector first, second;
};

// The numbers at even places of a and b, and those at odd places.
template <class Vector>
SAMERGE_INLINE Halves<Vector> split_pairs(Vector a, Vector b) {
  constexpr int kCount = kLanes<Vector>;
#ifdef __clang__
  Halves<Vector> places;
  for (int lane = 0; lane < kCount; ++lane) {
    const Vector& from = 2 * lane < kCount ? a : b;
    places.first[lane] = from[2 * lane % kCount];
    places.second[lane] = from[2 * lane % kCount + 1];
  }
  return places;
#else
  decltype(a < b) even;
  for (int lane = 0; lane < kCount; ++lane) even[lane] = 2 * lane;
  return {__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1)};
#endif
}

// The lanes joined pairwise, then the pairs, until one is left.
template <class Vector, class Join>
SAMERGE_INLINE lane_t<Vector> joined(Vector v, const Join& join) {
#ifdef __clang__
  lane_t<Vector> lanes[kLanes<Vector>];
  store(lanes, v);
  for (int width = kLanes<Vector> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = join(lanes[i], lanes[i + width]);
  return lanes[0];
#else
  decltype(v < v) lane;
  for (int i = 0; i < kLanes<Vector>; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int width = kLanes<Vector> / 2; width; width /= 2) v = join(v, __builtin_shuffle(v, lane ^ width));
  return v[0];
#endif
}

SAMERGE_INLINE double sum(Double v) {
  return joined(v, [](auto a, auto b) SAMERGE_INLINE_BODY { return a + b; });
}

SAMERGE_INLINE double sum(Float v) {
  HalfFloat halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return sum(__builtin_convertvector(halves[0], Double) + __builtin_convertvector(halves[1], Double));
}

template <class Vector>
SAMERGE_INLINE lane_t<Vector> max_lane(Vector v) {
  return joined(v, [](auto a, auto b) SAMERGE_INLINE_BODY { return a > b ? a : b; });
}

// exp(x * scale) for x * scale <= 88; 0 below -87.0 and at -inf; NaN stays NaN. Relative error at most 2^-23 for the
// arithmetic and |x * scale| * 2^-24 for the rounding of the factor: 2^(n + f) with |f| <= 1/2 and a polynomial in f, whose
// coefficients are a minimax fit of the relative error, 2e-9.
SAMERGE_INLINE Float exp_scaled(Float x, float scale) {
  constexpr float kRound =
      12582912.f + 127;  // 1.5 * 2^23: adding it leaves the nearest integer, biased, in the low bits
  const float factor = scale * 1.44269504088896341f;
  const Float shifted = x * factor + kRound;
  const Float n = shifted - kRound;
  const Float f = x * factor - n;
  Float y = f * 1.5353153867e-4f + 1.3399132295e-3f;
  y = y * f + 9.6184397116e-3f;
  y = y * f + 5.5503319949e-2f;
  y = y * f + 2.4022647738e-1f;
  y = y * f + 6.9314718246e-1f;
  y = y * f + 1.f;
  const Float power = (Float)((Bits)shifted << 23);
  return n < -125.5f ? Float{} : y * power;
}

SAMERGE_INLINE Double exp_scaled(Double x, double scale) {
  for (int lane = 0; lane < kLanes<Double>; ++lane) x[lane] = __builtin_exp(x[lane] * scale);
  return x;
}

// exp(-d) - 1 + d, where it is small.
SAMERGE_INLINE Float exp_remainder(Float d) { return exp_remainder_series(d); }

SAMERGE_INLINE Double exp_remainder(Double d) {
  for (int lane = 0; lane < kLanes<Double>; ++lane) d[lane] += __builtin_expm1(-d[lane]);
  return d;
}

// The logarithm of y = 1 + x in 0 ... 2, where x is that to full relative precision.
SAMERGE_INLINE Float log_one_plus(Float x, Float y) {
  const Int power = ((Int)y - 0x3f3504f3) >> 23;  // y / 2^power lies between sqrt(1/2) and sqrt(2)
  const Float scaled = (Float)((Int)y - (power << 23));
  return __builtin_convertvector(power, Float) * 0.693147180559945f + log_near_one(power == 0 ? x : scaled - 1.f);
}

SAMERGE_INLINE Double log_one_plus(Double x, Double y) {
  for (int lane = 0; lane < kLanes<Double>; ++lane)
    y[lane] = x[lane] > -0.5 ? __builtin_log1p(x[lane]) : __builtin_log(y[lane]);
  return y;
}

struct F32 {
  using Stored = float;
  using Vector = Float;
  static constexpr bool kWide = true;  // stored as it is computed in
  static SAMERGE_INLINE Float read(const float* p) { return load<Float>(p); }
  static SAMERGE_INLINE Float round(Float v) { return v; }
};

struct F64 {
  using Stored = double;
  using Vector = Double;
  static constexpr bool kWide = true;
  static SAMERGE_INLINE Double read(const double* p) { return load<Double>(p); }
  static SAMERGE_INLINE Double round(Double v) { return v; }
};

// GCC would widen each half of a vector by itself.
SAMERGE_INLINE Bits widen(HalfBits half) {
#if SAMERGE_VECTOR_BYTES == 64
  return (Bits)_mm512_cvtepu16_epi32((__m256i)half);
#elif SAMERGE_VECTOR_BYTES == 32
  return (Bits)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Bits);
#endif
}

// Rounding is to the nearest, ties to even; NaN stays NaN.
struct BF16 {
  using Stored = uint16_t;
  using Vector = Float;
  static constexpr bool kWide = false;
  // As split_pairs, of two vectors' numbers: an instruction each, where in order they take two.
  static SAMERGE_INLINE Halves<Float> read_pairs(const uint16_t* p) {
    const Bits pairs = load<Bits>(p);
    return {(Float)(pairs << 16), (Float)(pairs & 0xffff0000u)};
  }
  static SAMERGE_INLINE Float read(const uint16_t* p) { return (Float)(widen(load<HalfBits>(p)) << 16); }
  static SAMERGE_INLINE HalfBits round(Float v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(v != v ? Bits{} + 0x7fc0u : rounded, HalfBits);
  }
};

struct F16 {
  using Stored = uint16_t;
  using Vector = Float;
  static constexpr bool kWide = false;
#if SAMERGE_VECTOR_BYTES == 64
  static SAMERGE_INLINE Float read(const uint16_t* p) { return (Float)_mm512_cvtph_ps(load<__m256i>(p)); }
  static SAMERGE_INLINE HalfBits round(Float v) {
    return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif SAMERGE_VECTOR_BYTES == 32
  static SAMERGE_INLINE Float read(const uint16_t* p) { return (Float)_mm256_cvtph_ps(load<__m128i>(p)); }
  static SAMERGE_INLINE HalfBits round(Float v) {
    return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  static SAMERGE_INLINE Float read(const uint16_t* p) {
    const Bits half = widen(load<HalfBits>(p));
    const Float magnitude = (Float)((half & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormals included
    const Bits special = (Bits)(magnitude >= 65536.f) & 0x7f800000u;     // inf and NaN
    return (Float)((Bits)magnitude | special | ((half & 0x8000u) << 16));
  }
  static SAMERGE_INLINE HalfBits round(Float v) {
    const Bits sign = (Bits)v & 0x80000000u;
    const Float magnitude = (Float)((Bits)v ^ sign);
    const Bits bits = (Bits)magnitude;
    const Bits normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const Bits subnormal = (Bits)(magnitude + 0.5f) - 0x3f000000u;  // the addition shifts and rounds
    Bits half = magnitude < 0x1p-14f ? subnormal : normal;
    half = magnitude >= 65536.f ? Bits{} + 0x7c00u : half;
    half = v != v ? Bits{} + 0x7e00u : half;
    return __builtin_convertvector(half | (sign >> 16), HalfBits);
  }
#endif
};

}  // namespace samerge::SAMERGE_LEVEL
