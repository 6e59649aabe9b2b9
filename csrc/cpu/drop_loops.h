// A block of a row at a time: which numbers are kept, as integers; the products, as vectors; then zeros in the place of the others.
#pragma once

#include "../drop.h"
#include "simd.h"

namespace samerge::SAMERGE_LEVEL {

template <class Storage, class Stored = typename Storage::Stored>
void scale_block(const Stored* numbers, Stored* out, lane_t<typename Storage::Vector> factor) {  // [kBlock] of each
  for (int64_t i = 0; i < kBlock; i += kLanes<typename Storage::Vector>)
    store(out + i, Storage::round(Storage::read(numbers + i) * factor));
}

template <class Bits>
void drop_block(Bits* numbers, int64_t n, uint32_t place, uint32_t key, uint32_t threshold) {
  uint32_t kept[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) kept[i] = uniform(place + uint32_t(i), key) < threshold;
  for (int64_t i = 0; i < n; ++i) numbers[i] = kept[i] ? numbers[i] : Bits(0);
}

template <class Storage, class Bits, class Stored = typename Storage::Stored>
void drop_stretch(const Drop& a, int64_t row, int64_t stretch) {
  const int64_t first = stretch * kStretch, rest = a.count - first, count = rest < kStretch ? rest : kStretch;
  const auto* numbers = static_cast<const Stored*>(a.numbers) + row * a.stride + first;
  auto* out = static_cast<Stored*>(a.out) + row * a.out_stride + first;
  const auto key = uint32_t(a.keys[row * ((a.count + kStretch - 1) / kStretch) + stretch]);
  const auto threshold = uint32_t(a.thresholds[row]);
  const auto factor = static_cast<const lane_t<typename Storage::Vector>*>(a.factors)[row];
  alignas(64) Stored padded[kBlock] = {};
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = count - i < kBlock ? count - i : kBlock;
    if (n == kBlock) {
      scale_block<Storage>(numbers + i, out + i, factor);
    } else {
      __builtin_memcpy(padded, numbers + i, n * sizeof(Stored));
      scale_block<Storage>(padded, padded, factor);
      __builtin_memcpy(out + i, padded, n * sizeof(Stored));
    }
    drop_block(reinterpret_cast<Bits*>(out + i), n, uint32_t(i), key, threshold);
  }
}

void drop(const Drop& a, int64_t row, int64_t stretch) {
  if (a.dtype == DType::f32) drop_stretch<F32, uint32_t>(a, row, stretch);
  if (a.dtype == DType::bf16) drop_stretch<BF16, uint16_t>(a, row, stretch);
  if (a.dtype == DType::f16) drop_stretch<F16, uint16_t>(a, row, stretch);
  if (a.dtype == DType::f64) drop_stretch<F64, uint64_t>(a, row, stretch);
}

}  // namespace samerge::SAMERGE_LEVEL
