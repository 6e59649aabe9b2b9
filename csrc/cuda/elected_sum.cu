// out[i] = base[i] + scale * the mean, or the sum, of those weights[t] * task_vectors[t, i] that have the sign of their sum
//
// As weighted_sum: 128 threads take one block of 1,024 numbers at a time, with 16 bytes of up to eight task vectors in flight. A
// thread weighs what it has twice, for the sign and for the sum of those who agree; of more than eight task vectors the rest is
// read twice, from the caches. Moves (T + 1) reads and 1 write per number.
#include "device.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = 128, kKept = 8;

// Not part of a fused multiply-add: vectors that cancel must sum to zero.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

template <class Stored>
__global__ void __launch_bounds__(kThreads) elect(const ElectedSum a, int64_t num_blocks) {
  using Real = real_t<Stored>;
  constexpr int kCount = 16 / sizeof(Stored);
  const auto* weights = static_cast<const Real*>(a.weights);
  for (int64_t b = blockIdx.x; b < num_blocks; b += gridDim.x) {
    for (int i = threadIdx.x * kCount; i < kBlock; i += kThreads * kCount) {
      const int64_t first = b * kBlock + i;
      const auto read = [&](int64_t t) { return load_pack<Stored, kCount>(a.task_vectors, t * a.task_stride + first); };
      Pack<Stored, kCount> kept[kKept];
#pragma unroll
      for (int t = 0; t < kKept; ++t)
        if (t < a.num_tasks) kept[t] = read(t);
      Real merged[kCount];
      load(a.base, a.base_dtype, first, merged);

      // Calls use(weight, v) for every task, v being its weighted numbers as they read after being stored.
      const auto each = [&](const auto& use) {
        const auto weigh = [&](const Pack<Stored, kCount>& pack, Real weight) {
          Real v[kCount];
          widen(pack, a.task_dtype, v);
#pragma unroll
          for (int k = 0; k < kCount; ++k) v[k] = product(v[k], weight);
          widen(narrow<Stored, kCount>(v, a.task_dtype), a.task_dtype, v);
          use(weight, v);
        };
#pragma unroll
        for (int t = 0; t < kKept; ++t)
          if (t < a.num_tasks) weigh(kept[t], weights[t]);
#pragma unroll 1
        for (int64_t t = kKept; t < a.num_tasks; ++t) weigh(read(t), weights[t]);
      };
      Real total[kCount] = {}, sum[kCount] = {}, divisor[kCount] = {};
      each([&](Real, const Real* v) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) total[k] += v[k];
      });
      each([&](Real weight, const Real* v) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const bool agrees = total[k] >= 0 ? v[k] > 0 : v[k] < 0;
          sum[k] += agrees ? v[k] : Real(0);
          divisor[k] += agrees ? weight : Real(0);
        }
      });
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (a.normalize) sum[k] /= divisor[k] == 0 ? Real(1) : divisor[k];
        merged[k] += Real(a.scale) * (total[k] == total[k] ? sum[k] : total[k]);  // a NaN elects nobody, and shows
      }
      store(a.out, a.base_dtype, first, merged);
    }
  }
}

template <class Stored>
cudaError_t launch(const ElectedSum& a, int64_t num_blocks, cudaStream_t stream) {
  int64_t grid;
  if (const cudaError_t error = resident_blocks(elect<Stored>, kThreads, 0, num_blocks, &grid)) return error;
  elect<Stored><<<grid, kThreads, 0, stream>>>(a, num_blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t elected_sum(const ElectedSum& a, int64_t num_blocks, cudaStream_t stream) {
  switch (a.task_dtype) {
    case DType::f64: return launch<double>(a, num_blocks, stream);
    case DType::f32: return launch<float>(a, num_blocks, stream);
    default: return launch<uint16_t>(a, num_blocks, stream);
  }
}

}  // namespace samerge::gpu
