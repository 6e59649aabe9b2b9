// What the block products share: lines (rows or columns of a matrix, vectors of a basis) times a few vectors, a thread owning four
// places of all of them.
#pragma once

#include "device.cuh"

namespace samerge::gpu {

constexpr int kOwn = 4;   // places of a line that a thread owns
constexpr int kQuad = 4;  // lines that are read, and whose products are added up, at once

// The sums over all lanes of kCount values, lane l being told that of value l % kCount, always added in the same order.
template <int kCount, int kAll = kCount, class Real>
__device__ __forceinline__ Real warp_sums(const Real (&values)[kCount]) {
  if constexpr (kCount == 1) {
    Real sum = values[0];
#pragma unroll
    for (int offset = kAll; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    return sum;
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = threadIdx.x & kHalf;
    Real sums[kHalf];
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const Real given = upper ? values[k] : values[k + kHalf];
      sums[k] = (upper ? values[k + kHalf] : values[k]) + __shfl_xor_sync(kAllLanes, given, kHalf);
    }
    return warp_sums<kHalf, kAll>(sums);
  }
}

// A thread's numbers of a vector along the shorter side.
template <class Real>
__device__ __forceinline__ void load_own(const Real* vector, int place, int side, Real (&x)[kOwn]) {
  if (side % kOwn == 0 && place < side && reinterpret_cast<uintptr_t>(vector) % 16 == 0)
    return widen(load_pack<Real, kOwn>(vector, place), DType::f32, x);
#pragma unroll
  for (int s = 0; s < kOwn; ++s) x[s] = place + s < side ? vector[place + s] : Real(0);
}

template <class Real>
__device__ __forceinline__ void store_own(Real* vector, int place, int side, const Real (&x)[kOwn]) {
  if (side % kOwn == 0) {
    if (place < side) store_pack(vector, place, narrow<Real, kOwn>(x, DType::f32));
  } else {
#pragma unroll
    for (int s = 0; s < kOwn; ++s)
      if (place + s < side) vector[place + s] = x[s];
  }
}

// sums += the products of four lines with the vectors of q, of which own_q(j, x) reads the thread's numbers.
template <int kVectors, class Real, class OwnQ>
__device__ __forceinline__ void add_dots(const Real (*w)[kOwn], const OwnQ& own_q, Real (&sums)[kQuad * kVectors]) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    Real x[kOwn];
    own_q(j, x);
#pragma unroll
    for (int l = 0; l < kQuad; ++l)
#pragma unroll
      for (int s = 0; s < kOwn; ++s) sums[l * kVectors + j] += w[l][s] * x[s];
  }
}

// z += four lines times their numbers of y.
template <int kVectors, class Real>
__device__ __forceinline__ void add_lines(const Real (*w)[kOwn], const Real (*y)[kVectors], Real (&z)[kVectors][kOwn]) {
#pragma unroll
  for (int l = 0; l < kQuad; ++l)
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int s = 0; s < kOwn; ++s) z[j][s] += w[l][s] * y[l][j];
}

}  // namespace samerge::gpu
