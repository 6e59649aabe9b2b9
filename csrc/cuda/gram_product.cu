// z = q W^T W, or q W W^T where W has more columns than rows, W = scale * (base + matrix), for many matrices at once
//
// A block of threads takes one chunk of one matrix, a panel at a time. Of a tall matrix a panel is 64 whole rows: every
// warp multiplies four rows at a time with eight vectors of q, lanes along the row, into y in shared memory; then every
// thread takes a column of z down the panel, which the caches still hold. Of a wide matrix a panel is 256 columns, and
// the two products change their order. A block adds its panels in its own row of partials and a second kernel adds the
// chunks in double, in order, so nothing is atomic and results repeat to the bit. Moves W once from memory and once
// more from the cache for every eight vectors, and 2 * width * side numbers per chunk for the sums.
#include "matrix_source.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kPanelRows = 64, kTogether = 4;

// sums[r][j] = sum over the columns of row r times vector j, in every lane; rows beyond the last count as zero.
template <int kVectors, class Real, class Row, class Vector>
__device__ __forceinline__ void dot_rows(int64_t columns, Real (&sums)[kTogether][kVectors], Row row, Vector vector) {
#pragma unroll 1
  for (int64_t c = threadIdx.x % kWarp; c < columns; c += kWarp) {
    Real w[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) w[r] = row(r, c);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const Real x = vector(j, c);
#pragma unroll
      for (int r = 0; r < kTogether; ++r) sums[r][j] += w[r] * x;
    }
  }
#pragma unroll
  for (int r = 0; r < kTogether; ++r)
#pragma unroll
    for (int j = 0; j < kVectors; ++j) sums[r][j] = warp_sum(sums[r][j]);
}

template <int kVectors, class Real>
__device__ void multiply_rows(const GramProduct& a, const MatrixSource<Real>& source, Real scale, const Real* q,
                              int64_t begin, int64_t end, Real* z) {  // [kVectors, columns], [kVectors, columns]
  __shared__ Real y[kPanelRows][kVectors];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t first = begin; first < end; first += kPanelRows) {
    const int rows = end - first < kPanelRows ? end - first : kPanelRows;
    for (int group = warp * kTogether; group < rows; group += kWarps * kTogether) {
      Real sums[kTogether][kVectors] = {};
      dot_rows<kVectors>(a.columns, sums, [&](int r, int64_t c) {
        return group + r < rows ? scale * source(first + group + r, c) : Real(0);
      }, [&](int j, int64_t c) { return q[j * a.columns + c]; });
#pragma unroll
      for (int r = 0; r < kTogether; ++r)
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
          if (lane == 0 && group + r < rows) y[group + r][j] = sums[r][j];
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
      Real sums[kVectors] = {};
#pragma unroll 2
      for (int r = 0; r < rows; ++r) {
        const Real w = scale * source(first + r, c);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sums[j] += w * y[r][j];
      }
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
        z[j * a.columns + c] = first > begin ? z[j * a.columns + c] + sums[j] : sums[j];
    }
    __syncthreads();
  }
}

template <int kVectors, class Real>
__device__ void multiply_columns(const GramProduct& a, const MatrixSource<Real>& source, Real scale, const Real* q,
                                 int64_t begin, int64_t end, Real* z) {  // [kVectors, rows], [kVectors, rows]
  __shared__ Real y[kVectors][kThreads], some_q[kPanelRows][kVectors];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t first = begin; first < end; first += kThreads) {
    const int columns = end - first < kThreads ? end - first : kThreads;
    Real of_column[kVectors] = {};
    for (int64_t row = 0; row < a.rows; row += kPanelRows) {
      const int rows = a.rows - row < kPanelRows ? a.rows - row : kPanelRows;
      for (int i = threadIdx.x; i < rows * kVectors; i += kThreads)
        some_q[i / kVectors][i % kVectors] = q[i % kVectors * a.rows + row + i / kVectors];
      __syncthreads();
      if (threadIdx.x < columns) {
#pragma unroll 2
        for (int r = 0; r < rows; ++r) {
          const Real w = scale * source(row + r, first + threadIdx.x);
#pragma unroll
          for (int j = 0; j < kVectors; ++j) of_column[j] += w * some_q[r][j];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) y[j][threadIdx.x] = of_column[j];
    __syncthreads();
    for (int64_t row = warp * kTogether; row < a.rows; row += kWarps * kTogether) {
      Real sums[kTogether][kVectors] = {};
      dot_rows<kVectors>(columns, sums, [&](int r, int64_t c) {
        return row + r < a.rows ? scale * source(row + r, first + c) : Real(0);
      }, [&](int j, int64_t c) { return y[j][c]; });
#pragma unroll
      for (int r = 0; r < kTogether; ++r)
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          Real* const out = z + j * a.rows + row + r;
          if (lane == 0 && row + r < a.rows) *out = first > begin ? *out + sums[r][j] : sums[r][j];
        }
    }
    __syncthreads();
  }
}

// Grid: chunks, matrices.
template <int kVectors, class Real>
__global__ void __launch_bounds__(kThreads, 1) multiply(const GramProduct a, const Addresses at) {
  const int64_t i = blockIdx.y, side = a.side(), longer = a.tall() ? a.rows : a.columns;
  const int64_t begin = blockIdx.x * a.chunk, end = begin + a.chunk < longer ? begin + a.chunk : longer;
  const MatrixSource<Real> source(a, at, i);
  const Real* q = static_cast<const Real*>(a.q) + i * a.width * side;
  Real* z = static_cast<Real*>(a.partials) + (i * a.chunks + blockIdx.x) * a.width * side;
  for (int64_t j = 0; j < a.width; j += kVectors) {
    if (a.tall())
      multiply_rows<kVectors, Real>(a, source, a.scale[i], q + j * side, begin, end, z + j * side);
    else
      multiply_columns<kVectors, Real>(a, source, a.scale[i], q + j * side, begin, end, z + j * side);
  }
}

// Grid: parts of width * side, matrices.
template <class Real>
__global__ void __launch_bounds__(kThreads) add_chunks(const GramProduct a, Real* out) {
  const int64_t numbers = a.width * a.side(), i = blockIdx.y, k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= numbers) return;
  const Real* partials = static_cast<const Real*>(a.partials) + i * a.chunks * numbers + k;
  double sum = 0;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) sum += partials[chunk * numbers];
  out[i * numbers + k] = sum;
}

template <class Real>
cudaError_t launch(const GramProduct& a, const Addresses& at, Real* out, cudaStream_t stream) {
  const dim3 grid(a.chunks, at.count), sums((a.width * a.side() + kThreads - 1) / kThreads, at.count);
  if (a.width % 8 == 0)
    multiply<8, Real><<<grid, kThreads, 0, stream>>>(a, at);
  else
    multiply<kWidth, Real><<<grid, kThreads, 0, stream>>>(a, at);
  if (const cudaError_t error = cudaGetLastError()) return error;
  add_chunks<Real><<<sums, kThreads, 0, stream>>>(a, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gram_product(const GramProduct& a, const Addresses& at, void* out, cudaStream_t stream) {
  return a.wide ? launch(a, at, static_cast<double*>(out), stream) : launch(a, at, static_cast<float*>(out), stream);
}

}  // namespace samerge::gpu
