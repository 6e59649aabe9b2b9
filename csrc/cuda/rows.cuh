// Rows of numbers, of any length, tile by tile: a thread takes kCount numbers side by side, kPacks times.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace samerge::gpu {

// The largest magnitude, and of a number its bits without the sign's.
template <class Bits>
constexpr Bits kMagnitude = Bits(~Bits(0)) >> 1;

template <int kCount, class Stored>
__device__ __forceinline__ Pack<Stored, kCount> load_some(const Stored* row, int64_t first, int64_t count) {
  if (first + kCount <= count) return load_pack<Stored, kCount>(row, first);
  Pack<Stored, kCount> pack = {};  // zeros beyond the row's end
  for (int k = 0; k < kCount; ++k)
    if (first + k < count) pack.numbers[k] = row[first + k];
  return pack;
}

template <int kCount, class Stored>
__device__ __forceinline__ void store_some(Stored* row, int64_t first, int64_t count,
                                           const Pack<Stored, kCount>& pack) {
  if (first + kCount <= count) return store_pack<Stored, kCount>(row, first, pack);
  for (int k = 0; k < kCount; ++k)
    if (first + k < count) row[first + k] = pack.numbers[k];
}

// Calls run(stored, count): a value of the type that numbers are stored as, and how many of them an access moves.
template <class Stored, class Run>
cudaError_t with_access(Stored stored, bool vectors, const Run& run) {
  constexpr std::integral_constant<int, 16 / sizeof(Stored)> several{};
  return vectors ? run(stored, several) : run(stored, std::integral_constant<int, 1>());
}

}  // namespace samerge::gpu
