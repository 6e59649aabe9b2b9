// Numbers of twice the precision of those that they are made of: double for float, and unevaluated sums of two doubles for double
// (Dekker, Numerische Mathematik 18, 1971; Knuth, The Art of Computer Programming 2, 4.2.2). Of products of two numbers nothing is lost.
#pragma once

#include "device.cuh"

namespace samerge::gpu {

struct Twofold {
  double high, low;
};

// a + b, where a is not the smaller.
__device__ __forceinline__ Twofold ordered_sum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

__device__ __forceinline__ Twofold exact_sum(double a, double b) {
  const double sum = a + b, of_b = sum - a;
  return {sum, (a - (sum - of_b)) + (b - of_b)};
}

__device__ __forceinline__ double exact_product(float a, float b) { return double(a) * b; }
__device__ __forceinline__ Twofold exact_product(double a, double b) {
  const double product = __dmul_rn(a, b);
  return {product, fma(a, b, -product)};
}

__device__ __forceinline__ Twofold operator+(Twofold a, Twofold b) {
  const Twofold high = exact_sum(a.high, b.high), low = exact_sum(a.low, b.low);
  const Twofold sum = ordered_sum(high.high, high.low + low.high);
  return ordered_sum(sum.high, sum.low + low.low);
}

__device__ __forceinline__ Twofold operator-(Twofold a, Twofold b) { return a + Twofold{-b.high, -b.low}; }

__device__ __forceinline__ Twofold operator*(Twofold a, Twofold b) {
  const Twofold product = exact_product(a.high, b.high);
  return ordered_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

// A step of Newton's method doubles the digits that a division has.
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
__device__ __forceinline__ Twofold reciprocal(Twofold x) {
  const Twofold first = {1 / x.high, 0};
  return first + first * (Twofold{1, 0} - x * first);
}

__device__ __forceinline__ double rounded(double x) { return x; }
__device__ __forceinline__ double rounded(Twofold x) { return x.high; }

__device__ __forceinline__ Twofold warp_sum(Twofold x) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2)
    x = x + Twofold{__shfl_xor_sync(kAllLanes, x.high, offset), __shfl_xor_sync(kAllLanes, x.low, offset)};
  return x;
}

template <class Real>
struct Twice {
  using type = double;
};
template <>
struct Twice<double> {
  using type = Twofold;
};
template <class Real>
using twice_t = typename Twice<Real>::type;

}  // namespace samerge::gpu
