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

// As above, of codes: a thread takes a piece of the block, of kTasks task vectors, or of four at a time.
template <int kBits, class Real, int kTasks>
__global__ void __launch_bounds__(Codes<kBits>::kPieces, 512 / Codes<kBits>::kPieces)
    merge_codes(const WeightedSum a, int64_t num_blocks) {
  using C = Codes<kBits>;
  constexpr int kCount = kTasks ? kTasks : 4;
  const int first_of_block = C::first(threadIdx.x), group = first_of_block / kGroup;
  for (int64_t b = blockIdx.x; b < num_blocks; b += gridDim.x) {
    const int64_t layer = a.block_layer[b], first = b * kBlock + first_of_block;
    const bool known = layer >= 0 && layer < a.num_layers;
    const Real* coefficients = static_cast<const Real*>(a.coefficients) + (known ? layer : 0);
    Real sum[C::kRuns][C::kRun];
#pragma unroll
    for (int r = 0; r < C::kRuns; ++r) load(a.base, a.base_dtype, first + r * (kGroup / 2), sum[r]);
    for (int64_t t = 0; t < (kTasks ? kTasks : a.num_tasks); t += kCount) {
      typename C::Piece pieces[kCount];
      Real factors[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (!kTasks && t + k >= a.num_tasks) break;
        pieces[k] = C::load(a.task_vectors, (t + k) * a.task_stride, b, threadIdx.x);
        const Real coefficient = known ? coefficients[(t + k) * a.num_layers] : Real(NAN);
        factors[k] = coefficient * scale_value(a.scales, (t + k) * a.scale_stride + b * (kBlock / kGroup) + group);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (!kTasks && t + k >= a.num_tasks) break;
#pragma unroll
        for (int r = 0; r < C::kRuns; ++r) {
          float x[C::kRun];
          C::values(pieces[k], r, x);
#pragma unroll
          for (int j = 0; j < C::kRun; ++j) sum[r][j] += factors[k] * x[j];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < C::kRuns; ++r) store(a.out, a.out_dtype, first + r * (kGroup / 2), sum[r]);
  }
}

using Kernel = void (*)(WeightedSum, int64_t);

cudaError_t launch(Kernel kernel, int threads, const WeightedSum& a, int64_t num_blocks, cudaStream_t stream) {
  int64_t grid;
  if (const cudaError_t error = resident_blocks(kernel, threads, 0, num_blocks, &grid)) return error;
  kernel<<<grid, threads, 0, stream>>>(a, num_blocks);
  return cudaGetLastError();
}

template <class Stored>
cudaError_t launch(const WeightedSum& a, int64_t num_blocks, cudaStream_t stream) {
  constexpr Kernel kKernels[] = {
      merge<Stored, 0>, merge<Stored, 1>, merge<Stored, 2>, merge<Stored, 3>, merge<Stored, 4>,
      merge<Stored, 5>, merge<Stored, 6>, merge<Stored, 7>, merge<Stored, 8>,
  };
  return launch(kKernels[a.num_tasks <= 8 ? a.num_tasks : 0], kThreads, a, num_blocks, stream);
}

template <int kBits>
cudaError_t launch_codes(const WeightedSum& a, int64_t num_blocks, cudaStream_t stream) {
  constexpr Kernel kKernels[] = {
      merge_codes<kBits, float, 0>, merge_codes<kBits, float, 1>, merge_codes<kBits, float, 2>,
      merge_codes<kBits, float, 3>, merge_codes<kBits, float, 4>, merge_codes<kBits, float, 5>,
      merge_codes<kBits, float, 6>, merge_codes<kBits, float, 7>, merge_codes<kBits, float, 8>,
  };
  const Kernel wide = merge_codes<kBits, double, 0>;
  const Kernel kernel = a.base_dtype == DType::f64 ? wide : kKernels[a.num_tasks <= 8 ? a.num_tasks : 0];
  return launch(kernel, Codes<kBits>::kPieces, a, num_blocks, stream);
}

}  // namespace

cudaError_t weighted_sum(const WeightedSum& a, int64_t num_blocks, cudaStream_t stream) {
  switch (a.task_dtype) {
    case DType::f64: return launch<double>(a, num_blocks, stream);
    case DType::f32: return launch<float>(a, num_blocks, stream);
    case DType::i8: return launch_codes<8>(a, num_blocks, stream);
    case DType::i4: return launch_codes<4>(a, num_blocks, stream);
    default: return launch<uint16_t>(a, num_blocks, stream);
  }
}

}  // namespace samerge::gpu
