// The threads that work on one row of softmax_kl, and what they share about it. Reductions give every thread of a team the
// same value, always combined in the same order.
#pragma once

#include <cooperative_groups.h>

#include <climits>

#include "device.cuh"

#define SAMERGE_LEVEL gpu
#define SAMERGE_INLINE __device__ __forceinline__
#include "../softmax_kl_math.h"

namespace samerge::gpu {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// How a launch divides rows.
struct Plan {
  int cluster;        // blocks per row
  int chunks;         // packs per thread in a block's or warp's share of a row
  int teacher_bytes;  // of shared memory, for teachers[]
  bool keep;          // the share stays in shared memory between the passes
  bool aligned;       // all rows of logits begin on 16 bytes and consist of whole packs
  bool aligned_grad;  // so do those of the gradient
  bool same_temperature;
};

struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};
struct Smaller {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

template <class Self>
struct Team {
  template <class T>
  __device__ T max(T value) const {
    return static_cast<const Self*>(this)->reduce(value, Larger());
  }
  template <class T>
  __device__ T min(T value) const {
    return static_cast<const Self*>(this)->reduce(value, Smaller());
  }
  template <class T>
  __device__ T sum(T value) const {
    return static_cast<const Self*>(this)->reduce(value, Plus());
  }
};

struct WarpTeam : Team<WarpTeam> {
  static constexpr int kThreads = kWarp, kResident = 2;
  static constexpr bool kKeeps = false;  // in shared memory: short rows stay in the caches by themselves

  __device__ explicit WarpTeam(int) {}
  __device__ static int rank() { return threadIdx.x % kWarp; }
  __device__ static int index_in_block() { return threadIdx.x / kWarp; }
  __device__ int64_t index() const { return int64_t(blockIdx.x) * kWarps + index_in_block(); }
  __device__ int64_t count() const { return int64_t(gridDim.x) * kWarps; }
  __device__ int block_in_cluster() const { return 0; }
  __device__ void wait() const { __syncwarp(); }

  template <class T, class Op>
  __device__ T reduce(T value, Op op) const {
    return warp_reduce(value, op);
  }
};

// One block, or a cluster of blocks, which sm_90 has and earlier devices have not.
struct BlockTeam : Team<BlockTeam> {
  static constexpr int kThreads = gpu::kThreads,
                       kResident = 3;  // blocks on a multiprocessor that registers must suffice for
  static constexpr bool kKeeps = true;
  int blocks;

  __device__ explicit BlockTeam(int cluster) : blocks(cluster) {}
  __device__ static int rank() { return threadIdx.x; }
  __device__ static int index_in_block() { return 0; }
  __device__ int64_t index() const { return blockIdx.x / blocks; }
  __device__ int64_t count() const { return gridDim.x / blocks; }
  __device__ int block_in_cluster() const { return blockIdx.x % blocks; }
  __device__ void wait() const { __syncthreads(); }

  template <class T, class Op>
  __device__ T reduce(T value, Op op) const {
    __shared__ T of_warps[kWarps];
    value = warp_reduce(value, op);
    __syncthreads();  // the last reduction's values have been read
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warps[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value = op(value, of_warps[w]);
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      __shared__ T of_block;
      const auto cluster = cooperative_groups::this_cluster();
      if (threadIdx.x == 0) of_block = value;
      cluster.sync();
      value = *cluster.map_shared_rank(&of_block, 0);
      for (int b = 1; b < blocks; ++b) value = op(value, *cluster.map_shared_rank(&of_block, b));
      cluster.sync();  // no block overwrites its value, or ends, before all have read it
    }
#endif
    return value;
  }
};

// Differences of logits over a temperature, and their exponentials.
template <class Real>
struct Temperature {
  Real inverse, inverse_log2;

  __device__ explicit Temperature(double temperature)
      : inverse(1 / temperature), inverse_log2(1.4426950408889634 / temperature) {}

  __device__ __forceinline__ float exp(
      float difference) const {  // within 2 ulp near 0; 0 below the smallest normal number
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(difference * inverse_log2));
    return y;
  }
  __device__ __forceinline__ double exp(double difference) const { return ::exp(difference * inverse); }

  __device__ __forceinline__ Partition<Real, Real> rescale(const Partition<Real, Real>& seen, Real larger) const;
};

// A maximum that can be subtracted: while all numbers are -inf, their exponentials must be 0, not NaN.
template <class Real>
__device__ __forceinline__ Real finite(Real max) {
  return max == -INFINITY ? Real(0) : max;
}

template <class Real>
__device__ __forceinline__ Partition<Real, Real> Temperature<Real>::rescale(const Partition<Real, Real>& seen,
                                                                            Real larger) const {
  const Real difference = seen.max - finite(larger);
  return rescaled(seen, larger, difference * inverse, exp(difference));
}

__device__ __forceinline__ float exp_remainder(float d) { return exp_remainder_series(d); }
__device__ __forceinline__ double exp_remainder(double d) { return expm1(-d) + d; }

// The logarithm of y = 1 + x in 0 ... 2, where x is that to full relative precision.
__device__ __forceinline__ float log_one_plus(float x, float y) { return fabsf(x) < 0.25f ? log_near_one(x) : logf(y); }
__device__ __forceinline__ double log_one_plus(double x, double y) { return x > -0.5 ? log1p(x) : log(y); }

template <class Real>
struct Normalizer {
  Real max;          // m
  Real inverse_sum;  // 1 / Z
  Real log_sum;      // log Z
  Real entropy;      // log Z - (sum of exp(y) * y) / Z with y = (x - m) / temperature: no term cancels another
};

template <class Real>
struct Teacher {
  Real max, inverse_sum;      // of divergences
  Real max_gap, log_sum_gap;  // its m and log Z beyond the student's; of divergences
  Real weight;
  int target;  // cross_entropy
};

}  // namespace samerge::gpu

#include "../softmax_kl_divergences.h"
