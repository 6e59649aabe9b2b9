// Vectors of a task vector's codes, whole numbers that kGroup at a time share a scale; see DType.
#pragma once

#include "simd.h"

namespace samerge::SAMERGE_LEVEL {

inline float scale_value(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

// One vector of codes from bytes that hold a code each; GCC would widen each quarter of a vector by itself.
#if SAMERGE_VECTOR_BYTES == 64
SAMERGE_INLINE Int widen(const int8_t* p) { return (Int)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
SAMERGE_INLINE Int widen(const uint8_t* p) { return (Int)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
#elif SAMERGE_VECTOR_BYTES == 32
SAMERGE_INLINE Int widen(const int8_t* p) { return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
SAMERGE_INLINE Int widen(const uint8_t* p) { return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
template <class Byte>
SAMERGE_INLINE Int widen(const Byte* p) {
  typedef Byte Quarter __attribute__((vector_size(kBytes / 4)));
  return __builtin_convertvector(load<Quarter>(p), Int);
}
#endif

// read(block, group, i): codes i ... of a group's first half, and those kGroup / 2 further on; a block begins at its first
// byte. kBytes: of a group.
template <class V>
struct Int8 {
  using Vector = V;
  static constexpr int64_t kBytes = kGroup;
  static SAMERGE_INLINE Halves<V> read(const uint8_t* block, int64_t group, int64_t i) {
    const auto* codes = reinterpret_cast<const int8_t*>(block) + group * kBytes + i;
    return {vector(codes), vector(codes + kGroup / 2)};
  }
  static SAMERGE_INLINE V vector(const int8_t* codes) {
    if constexpr (sizeof(lane_t<V>) == 4) return __builtin_convertvector(widen(codes), V);
    V v;
    for (int lane = 0; lane < kLanes<V>; ++lane) v[lane] = codes[lane];
    return v;
  }
};

template <class V>
struct Int4 {
  using Vector = V;
  static constexpr int64_t kBytes = kGroup / 2;
  static SAMERGE_INLINE Halves<V> read(const uint8_t* block, int64_t group, int64_t i) {
    const uint8_t* pairs = block + group * kBytes + i;
    if constexpr (sizeof(lane_t<V>) == 4) {
      const Int pair = widen(pairs);
      if constexpr (kLanes<V> == 16) {  // a shuffle looks at four bits of an index
        const Float values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        return {__builtin_shuffle(values, pair), __builtin_shuffle(values, pair >> 4)};
      } else {
        return {__builtin_convertvector((pair & 15) - 8, V), __builtin_convertvector((pair >> 4) - 8, V)};
      }
    }
    Halves<V> v;
    for (int lane = 0; lane < kLanes<V>; ++lane) v.first[lane] = (pairs[lane] & 15) - 8;
    for (int lane = 0; lane < kLanes<V>; ++lane) v.second[lane] = (pairs[lane] >> 4) - 8;
    return v;
  }
};

// Asks for the group that lies a block further on.
template <class Codes>
SAMERGE_INLINE void prefetch_codes(const uint8_t* block, int64_t group) {
  for (int64_t byte = 0; byte < Codes::kBytes; byte += 64)
    prefetch(block + (group + kBlock / kGroup) * Codes::kBytes + byte);
}

}  // namespace samerge::SAMERGE_LEVEL
