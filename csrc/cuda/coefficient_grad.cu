// out[t, l] = sum over i in layer l of grad[i] * task_vectors[t, i]
//
// Two stages without atomics, so that the result repeats to the bit. In the first a warp multiplies one block of 1,024
// numbers of the gradient with the task vectors, up to eight at a time, and writes one sum per task; a grid that fills the
// device walks over the blocks. In the second, a block of threads adds in double the sums of one layer, of
// up to eight tasks; where a layer begins it finds by a search in block_layer. Moves (T + 1) reads per number, and 16 T bytes per block for the sums.
#include "device.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kSumThreads = 1024;

// Adds the lanes' sums of kCount task vectors, and writes as many as there are.
template <class Real, int kCount>
__device__ __forceinline__ void write_sums(const Real (&sums)[kCount], double* partials, int64_t num_tasks) {
  const int lane = threadIdx.x % kWarp;
  Real mine = 0;  // lane k keeps the sum of task k
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const Real sum = warp_sum(sums[k]);
    mine = lane == k ? sum : mine;
  }
  if (lane < kCount && lane < num_tasks) partials[lane] = mine;
}

// kTasks task vectors, or any number, eight at a time, where it is 0. (Left to itself, the compiler at times spills a register for
// the sake of more warps: of 16-bit numbers and of codes two blocks of threads per multiprocessor are all that is asked for.)
template <class Stored, int kTasks>
__global__ void __launch_bounds__(kThreads, sizeof(Stored) == 2 ? 2 : 0)
    dot_blocks(const CoefficientGrad a, int64_t num_blocks) {
  using Real = real_t<Stored>;
  constexpr int kCount = 16 / sizeof(Stored), kGroup = kTasks ? kTasks : 8;
  const int lane = threadIdx.x % kWarp;
  const int64_t num_tasks = kTasks ? kTasks : a.num_tasks, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; b < num_blocks; b += warps) {
    for (int64_t t = 0; t < num_tasks; t += kGroup) {
      Real sums[kGroup] = {};
      for (int i = lane * kCount; i < kBlock; i += kWarp * kCount) {
        const int64_t first = b * kBlock + i;
        Pack<Stored, kCount> packs[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
          if (kTasks || t + k < num_tasks)
            packs[k] = load_pack<Stored, kCount>(a.task_vectors, (t + k) * a.task_stride + first);
        Real g[kCount];
        load(a.grad, a.grad_dtype, first, g);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          if (!kTasks && t + k >= num_tasks) break;
          Real x[kCount];
          widen(packs[k], a.task_dtype, x);
#pragma unroll
          for (int j = 0; j < kCount; ++j) sums[k] += g[j] * x[j];
        }
      }
      write_sums<Real, kGroup>(sums, a.partials + b * num_tasks + t, num_tasks - t);
    }
  }
}

// As above, of codes, a piece of kTasks task vectors, or of four, at a time.
template <int kBits, class Real, int kTasks>
__global__ void __launch_bounds__(kThreads, 2) dot_codes(const CoefficientGrad a, int64_t num_blocks) {
  using C = Codes<kBits>;
  constexpr int kCount = kTasks ? kTasks : 4;
  const int lane = threadIdx.x % kWarp;
  const int64_t num_tasks = kTasks ? kTasks : a.num_tasks, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; b < num_blocks; b += warps) {
    for (int64_t t = 0; t < num_tasks; t += kCount) {
      Real sums[kCount] = {};
#pragma unroll 1
      for (int piece = lane; piece < C::kPieces; piece += kWarp) {
        const int first = C::first(piece);
        typename C::Piece pieces[kCount];
        float scales[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (!kTasks && t + k >= num_tasks) break;
          pieces[k] = C::load(a.task_vectors, (t + k) * a.task_stride, b, piece);
          scales[k] = scale_value(a.scales, (t + k) * a.scale_stride + b * (kBlock / kGroup) + first / kGroup);
        }
        Real g[C::kRuns][C::kRun];
#pragma unroll
        for (int r = 0; r < C::kRuns; ++r) load(a.grad, a.grad_dtype, b * kBlock + first + r * (kGroup / 2), g[r]);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (!kTasks && t + k >= num_tasks) break;
          Real part = 0;
#pragma unroll
          for (int r = 0; r < C::kRuns; ++r) {
            float x[C::kRun];
            C::values(pieces[k], r, x);
#pragma unroll
            for (int j = 0; j < C::kRun; ++j) part += g[r][j] * x[j];
          }
          sums[k] += part * scales[k];
        }
      }
      write_sums<Real, kCount>(sums, a.partials + b * num_tasks + t, num_tasks - t);
    }
  }
}

// The number of blocks of earlier layers, found by a whole warp: each round keeps one of 32 parts of what is left.
__device__ int64_t blocks_before(const int32_t* block_layer, int64_t num_blocks, int64_t layer) {
  int64_t begin = 0, end = num_blocks;
  while (begin < end) {
    const int64_t step = (end - begin + kWarp - 1) / kWarp, place = begin + threadIdx.x % kWarp * step;
    const int count = __popc(__ballot_sync(kAllLanes, place < end && block_layer[place] < layer));
    end = min(end, begin + count * step);
    begin = max(begin, begin + (count - 1) * step + 1);
  }
  return begin;
}

// Grid: layers, groups of kTasks tasks. Neighbouring threads read the tasks of a block, which lie side by side.
template <class Real, int kTasks>
__global__ void __launch_bounds__(kSumThreads) add_blocks(Real* out, const double* partials, const int32_t* block_layer,
                                                          int64_t num_blocks, int64_t num_layers, int64_t num_tasks) {
  constexpr int kRows = kSumThreads / kTasks, kWarps = kSumThreads / kWarp;
  const int64_t layer = blockIdx.x, task = blockIdx.y * kTasks + threadIdx.x % kTasks;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __shared__ int64_t bounds[2];
  if (warp < 2) {
    const int64_t before = blocks_before(block_layer, num_blocks, layer + warp);
    if (lane == 0) bounds[warp] = before;
  }
  __syncthreads();
  double sum = 0;
  if (task < num_tasks) {
#pragma unroll 8
    for (int64_t b = bounds[0] + threadIdx.x / kTasks; b < bounds[1]; b += kRows) sum += partials[b * num_tasks + task];
  }
#pragma unroll
  for (int offset = kWarp / 2; offset >= kTasks; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  __shared__ double of_warps[kWarps][kTasks];
  if (lane < kTasks) of_warps[warp][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= kTasks || task >= num_tasks) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += of_warps[w][threadIdx.x];
  out[task * num_layers + layer] = sum;
}

using Kernel = void (*)(CoefficientGrad, int64_t);

template <class Real>
cudaError_t launch(Kernel kernel, const CoefficientGrad& a, void* out, const int32_t* block_layer, int64_t num_blocks,
                   int64_t num_layers, cudaStream_t stream) {
  int64_t grid;
  if (const cudaError_t error = resident_blocks(kernel, kThreads, 0, (num_blocks + kWarps - 1) / kWarps, &grid))
    return error;
  kernel<<<grid, kThreads, 0, stream>>>(a, num_blocks);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const int tasks = a.num_tasks > 4 ? 8 : a.num_tasks > 2 ? 4 : a.num_tasks;
  const auto add = tasks == 8   ? add_blocks<Real, 8>
                   : tasks == 4 ? add_blocks<Real, 4>
                   : tasks == 2 ? add_blocks<Real, 2>
                                : add_blocks<Real, 1>;
  const dim3 sums(num_layers, (a.num_tasks + tasks - 1) / tasks);
  add<<<sums, kSumThreads, 0, stream>>>(static_cast<Real*>(out), a.partials, block_layer, num_blocks, num_layers,
                                        a.num_tasks);
  return cudaGetLastError();
}

template <class Stored>
Kernel kernel_for(int64_t num_tasks) {
  constexpr Kernel kKernels[] = {
      dot_blocks<Stored, 0>, dot_blocks<Stored, 1>, dot_blocks<Stored, 2>, dot_blocks<Stored, 3>, dot_blocks<Stored, 4>,
      dot_blocks<Stored, 5>, dot_blocks<Stored, 6>, dot_blocks<Stored, 7>, dot_blocks<Stored, 8>,
  };
  return kKernels[num_tasks <= 8 ? num_tasks : 0];
}

template <int kBits>
Kernel kernel_for_codes(int64_t num_tasks, DType grad_dtype) {
  constexpr Kernel kKernels[] = {
      dot_codes<kBits, float, 0>, dot_codes<kBits, float, 1>, dot_codes<kBits, float, 2>,
      dot_codes<kBits, float, 3>, dot_codes<kBits, float, 4>, dot_codes<kBits, float, 5>,
      dot_codes<kBits, float, 6>, dot_codes<kBits, float, 7>, dot_codes<kBits, float, 8>,
  };
  return grad_dtype == DType::f64 ? Kernel(dot_codes<kBits, double, 0>) : kKernels[num_tasks <= 8 ? num_tasks : 0];
}

Kernel kernel_for(const CoefficientGrad& a) {
  switch (a.task_dtype) {
    case DType::f64: return kernel_for<double>(a.num_tasks);
    case DType::f32: return kernel_for<float>(a.num_tasks);
    case DType::i8: return kernel_for_codes<8>(a.num_tasks, a.grad_dtype);
    case DType::i4: return kernel_for_codes<4>(a.num_tasks, a.grad_dtype);
    default: return kernel_for<uint16_t>(a.num_tasks);
  }
}

}  // namespace

cudaError_t coefficient_grad(const CoefficientGrad& a, void* out, const int32_t* block_layer, int64_t num_blocks,
                             int64_t num_layers, cudaStream_t stream) {
  const auto launch_for = a.grad_dtype == DType::f64 ? launch<double> : launch<float>;
  return launch_for(kernel_for(a), a, out, block_layer, num_blocks, num_layers, stream);
}

}  // namespace samerge::gpu
