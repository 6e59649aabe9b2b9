// out[i] = base[i] + sum over t of coefficients[t, layer(i)] * task_vectors[t, i]
//
// 128 threads merge one block of 1,024 numbers at a time, which lies in one layer; a grid that fills the device walks over the
// blocks. Every thread has 16 bytes of up to eight task vectors in flight before it adds the first. Moves (T + 1) reads and 1
// write per number.
#include "device.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = 128;

// kTasks task vectors, or any number, eight at a time, where it is 0.
template <class Stored, int kTasks>
__global__ void __launch_bounds__(kThreads) merge(const WeightedSum a, int64_t num_blocks) {
  using Real = real_t<Stored>;
  constexpr int kCount = 16 / sizeof(Stored), kGroup = kTasks ? kTasks : 8;
  for (int64_t b = blockIdx.x; b < num_blocks; b += gridDim.x) {
    const int64_t layer = a.block_layer[b];
    const bool known = layer >= 0 && layer < a.num_layers;
    const Real* coefficients = static_cast<const Real*>(a.coefficients) + (known ? layer : 0);
    for (int i = threadIdx.x * kCount; i < kBlock; i += kThreads * kCount) {
      const int64_t first = b * kBlock + i;
      Real sum[kCount];
      load(a.base, a.base_dtype, first, sum);
      for (int64_t t = 0; t < (kTasks ? kTasks : a.num_tasks); t += kGroup) {
        Pack<Stored, kCount> packs[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
          if (kTasks || t + k < a.num_tasks)
            packs[k] = load_pack<Stored, kCount>(a.task_vectors, (t + k) * a.task_stride + first);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          if (!kTasks && t + k >= a.num_tasks) break;
          const Real coefficient = known ? coefficients[(t + k) * a.num_layers] : Real(NAN);
          Real x[kCount];
          widen(packs[k], a.task_dtype, x);
#pragma unroll
          for (int j = 0; j < kCount; ++j) sum[j] += coefficient * x[j];
        }
      }
      store(a.out, a.out_dtype, first, sum);
    }
  }
}

template <class Stored>
cudaError_t launch(const WeightedSum& a, int64_t num_blocks, cudaStream_t stream) {
  constexpr void (*kKernels[])(WeightedSum, int64_t) = {
      merge<Stored, 0>, merge<Stored, 1>, merge<Stored, 2>, merge<Stored, 3>, merge<Stored, 4>,
      merge<Stored, 5>, merge<Stored, 6>, merge<Stored, 7>, merge<Stored, 8>,
  };
  const auto kernel = kKernels[a.num_tasks <= 8 ? a.num_tasks : 0];
  int64_t grid;
  if (const cudaError_t error = resident_blocks(kernel, kThreads, 0, num_blocks, &grid)) return error;
  kernel<<<grid, kThreads, 0, stream>>>(a, num_blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t weighted_sum(const WeightedSum& a, int64_t num_blocks, cudaStream_t stream) {
  switch (a.task_dtype) {
    case DType::f64: return launch<double>(a, num_blocks, stream);
    case DType::f32: return launch<float>(a, num_blocks, stream);
    default: return launch<uint16_t>(a, num_blocks, stream);
  }
}

}  // namespace samerge::gpu
