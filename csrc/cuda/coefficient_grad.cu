// out[t, l] = sum over i in layer l of grad[i] * task_vectors[t, i]
//
// Two stages without atomics, so that the result repeats to the bit. In the first a warp multiplies one block of 1,024
// numbers of the gradient with the task vectors, up to eight at a time, and writes one sum per task; a grid that fills the
// device walks over the blocks. In the second, a block of threads adds in double the sums of one layer and task; where a
// layer begins it finds by a search in block_layer. Moves (T + 1) reads per number, and 16 T bytes per block for the sums.
#include "device.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// kTasks task vectors, or any number, eight at a time, where it is 0.
template <class Stored, int kTasks>
__global__ void __launch_bounds__(kThreads) dot_blocks(const CoefficientGrad a, int64_t num_blocks) {
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
      Real mine = 0;  // lane k keeps the sum of task t + k
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const Real sum = warp_sum(sums[k]);
        mine = lane == k ? sum : mine;
      }
      if (lane < kGroup && t + lane < num_tasks) a.partials[b * num_tasks + t + lane] = mine;
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

template <class Real>
__global__ void __launch_bounds__(kThreads)
    add_blocks(Real* out, const double* partials, const int32_t* block_layer, int64_t num_blocks, int64_t num_layers) {
  const int64_t layer = blockIdx.x, task = blockIdx.y, num_tasks = gridDim.y;
  const int64_t begin = blocks_before(block_layer, num_blocks, layer);
  const int64_t end = blocks_before(block_layer, num_blocks, layer + 1);
  double sum = 0;
#pragma unroll 8
  for (int64_t b = begin + threadIdx.x; b < end; b += kThreads) sum += partials[b * num_tasks + task];
  __shared__ double of_warps[kWarps];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; ++w) sum += of_warps[w];
  out[task * num_layers + layer] = sum;
}

template <class Stored>
cudaError_t launch(const CoefficientGrad& a, void* out, const int32_t* block_layer, int64_t num_blocks, int64_t num_layers,
                   cudaStream_t stream) {
  using Real = real_t<Stored>;
  constexpr void (*kKernels[])(CoefficientGrad, int64_t) = {
      dot_blocks<Stored, 0>, dot_blocks<Stored, 1>, dot_blocks<Stored, 2>, dot_blocks<Stored, 3>, dot_blocks<Stored, 4>,
      dot_blocks<Stored, 5>, dot_blocks<Stored, 6>, dot_blocks<Stored, 7>, dot_blocks<Stored, 8>,
  };
  const auto kernel = kKernels[a.num_tasks <= 8 ? a.num_tasks : 0];
  int64_t grid;
  if (const cudaError_t error = resident_blocks(kernel, kThreads, 0, (num_blocks + kWarps - 1) / kWarps, &grid)) return error;
  kernel<<<grid, kThreads, 0, stream>>>(a, num_blocks);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const dim3 sums(num_layers, a.num_tasks);
  add_blocks<Real><<<sums, kThreads, 0, stream>>>(static_cast<Real*>(out), a.partials, block_layer, num_blocks, num_layers);
  return cudaGetLastError();
}

}  // namespace

cudaError_t coefficient_grad(const CoefficientGrad& a, void* out, const int32_t* block_layer, int64_t num_blocks,
                             int64_t num_layers, cudaStream_t stream) {
  switch (a.task_dtype) {
    case DType::f64: return launch<double>(a, out, block_layer, num_blocks, num_layers, stream);
    case DType::f32: return launch<float>(a, out, block_layer, num_blocks, num_layers, stream);
    default: return launch<uint16_t>(a, out, block_layer, num_blocks, num_layers, stream);
  }
}

}  // namespace samerge::gpu
