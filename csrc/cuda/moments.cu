// Mean, population variance, norm and largest magnitude of W = base + matrix, for many matrices at once
//
// A block of threads takes a segment of one matrix. A thread reads four numbers of every piece of 1,024, finds their
// mean and the squares of the deviations from it in double, and combines these with what it has; a fixed tree combines
// the threads, and a warp of a second kernel the segments of a matrix. Nothing cancels, nothing is atomic. Moves W
// once, in single numbers that a warp reads side by side.
#include "matrix_source.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kCount = kPiece / kThreads;

__device__ Moments warp_combined(Moments mine) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) {
    const Moments other = {
        __shfl_down_sync(kAllLanes, mine.count, offset), __shfl_down_sync(kAllLanes, mine.mean, offset),
        __shfl_down_sync(kAllLanes, mine.squares, offset), __shfl_down_sync(kAllLanes, mine.largest, offset)};
    combine(mine, other);
  }
  return mine;  // right in lane 0
}

// Grid: segments, matrices.
__global__ void __launch_bounds__(kThreads) of_segments(const MomentsCall a, const Addresses at) {
  const MatrixSource<double> source(a, at, blockIdx.y);
  const int64_t row_pieces = (a.columns + kPiece - 1) / kPiece, pieces = a.rows * row_pieces;
  const int64_t begin = blockIdx.x * kSegmentPieces,
                end = begin + kSegmentPieces < pieces ? begin + kSegmentPieces : pieces;
  Moments mine = {};
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = piece / row_pieces, first = piece % row_pieces * kPiece + threadIdx.x;
    double x[kCount];
    Moments some = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool there = first + k * kThreads < a.columns;
      x[k] = there ? source(row, first + k * kThreads) : 0;
      some.count += there;
      some.mean += x[k];
    }
    if (!some.count) continue;
    some.mean /= some.count;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const double magnitude = fabs(x[k]), deviation = k < some.count ? x[k] - some.mean : 0;
      some.squares += deviation * deviation;
      if (magnitude > some.largest || magnitude != magnitude) some.largest = magnitude;
    }
    combine(mine, some);
  }
  __shared__ Moments of_warps[kWarps];
  mine = warp_combined(mine);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; ++w) combine(mine, of_warps[w]);
  a.partials[blockIdx.y * a.segments + blockIdx.x] = mine;
}

// Grid: matrices; a warp each.
__global__ void __launch_bounds__(kWarp) of_matrices(const MomentsCall a, double* out) {
  Moments mine = {};
  for (int64_t s = threadIdx.x; s < a.segments; s += kWarp) combine(mine, a.partials[blockIdx.x * a.segments + s]);
  mine = warp_combined(mine);
  if (threadIdx.x) return;
  double* row = out + blockIdx.x * 4;
  row[0] = mine.mean;
  row[1] = mine.count ? mine.squares / mine.count : 0;
  row[2] = sqrt(mine.squares + mine.count * mine.mean * mine.mean);
  row[3] = mine.largest;
}

}  // namespace

cudaError_t moments(const MomentsCall& a, const Addresses& at, double* out, cudaStream_t stream) {
  if (a.segments) of_segments<<<dim3(a.segments, at.count), kThreads, 0, stream>>>(a, at);
  if (const cudaError_t error = cudaGetLastError()) return error;
  of_matrices<<<at.count, kWarp, 0, stream>>>(a, out);
  return cudaGetLastError();
}

}  // namespace samerge::gpu
