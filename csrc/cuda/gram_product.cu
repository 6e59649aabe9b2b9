// z = q W^T W, or q W W^T where W has more columns than rows, W = scale * (base + matrix), for many matrices at once
//
// The lines of W, which are its rows, or its columns where these are more, are cut into chunks, a block of threads for
// each. A thread owns four places of every line. It reads its numbers of four lines into registers, 16 bytes at a time,
// and multiplies them with eight vectors of q; the block adds what its threads have to y, a number per line and vector;
// and the same registers times y are added to z, which stays in registers to the end of the chunk: W is read once for
// every eight vectors, or four in double. Where lines are longer than a block can own, z takes up panels of 64 lines, and
// W is read once more, from the caches. A chunk has its own row of partials and a second kernel adds the chunks in double, in order, so nothing
// is atomic and results repeat to the bit. Moves 2 * width * side numbers per chunk for the sums.
#include "lines.cuh"

namespace samerge::gpu {
namespace {

constexpr int kMostThreads = 256;

// The matrices or the bases of a call, one of them at a time.
struct Rows {
  const void* data;
  int64_t stride;
  int rows, columns;  // those that are read; beyond them lie zeros
  DType dtype;
  bool aligned;  // rows begin on 16 bytes

  // kCount numbers from a place on that is a multiple of kCount.
  template <class Stored, int kCount>
  __device__ __forceinline__ Pack<Stored, kCount> run(int row, int column) const {
    Pack<Stored, kCount> pack = {};
    const int64_t first = row * stride + column;
    if (row >= rows) return pack;
    if (aligned && column + kCount <= columns) return load_pack<Stored, kCount>(data, first);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (column + k < columns) pack.numbers[k] = static_cast<const Stored*>(data)[first + k];
    return pack;
  }

  // w += a thread's numbers of the lines from `line` on, all of which are on their way before the first is used.
  template <class Stored, int kLines, class Real>
  __device__ __forceinline__ void add_stored(bool tall, int line, int place, Real (&w)[kLines][kOwn]) const {
    if (tall) {
      Pack<Stored, kOwn> packs[kLines];
#pragma unroll
      for (int l = 0; l < kLines; ++l) packs[l] = run<Stored, kOwn>(line + l, place);
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        real_t<Stored> x[kOwn];
        widen(packs[l], dtype, x);
#pragma unroll
        for (int s = 0; s < kOwn; ++s) w[l][s] += x[s];
      }
    } else {
      Pack<Stored, kLines> packs[kOwn];
#pragma unroll
      for (int s = 0; s < kOwn; ++s) packs[s] = run<Stored, kLines>(place + s, line);
#pragma unroll
      for (int s = 0; s < kOwn; ++s) {
        real_t<Stored> x[kLines];
        widen(packs[s], dtype, x);
#pragma unroll
        for (int l = 0; l < kLines; ++l) w[l][s] += x[l];
      }
    }
  }

  template <int kLines, class Real>
  __device__ __forceinline__ void add(bool tall, int line, int place, Real (&w)[kLines][kOwn]) const {
    if (dtype == DType::f32) return add_stored<float>(tall, line, place, w);
    if constexpr (sizeof(Real) == 8)
      if (dtype == DType::f64) return add_stored<double>(tall, line, place, w);
    add_stored<uint16_t>(tall, line, place, w);
  }
};

__device__ Rows rows_of(const void* data, int64_t stride, DType dtype, int rows, int columns) {
  return {data, stride, rows, columns, dtype, on_16_bytes(data, stride * bytes_of(dtype))};
}

// The lines of W up to `end`.
template <class Real>
struct Lines {
  Rows matrix, base;
  bool tall;
  Real scale;

  __device__ Lines(const GramProduct& a, const Addresses& at, int i, int end) : tall(a.tall()), scale(a.scale[i]) {
    const int rows = tall ? end : a.rows, columns = tall ? a.columns : end;
    matrix = rows_of(at.matrices[i], a.matrix_stride, a.matrix_dtype, rows, columns);
    base = rows_of(a.bases ? at.bases[i] : nullptr, a.base_stride, a.base_dtype, rows, columns);
  }

  template <int kLines>
  __device__ __forceinline__ void load(int line, int place, Real (&w)[kLines][kOwn]) const {
#pragma unroll
    for (int l = 0; l < kLines; ++l)
#pragma unroll
      for (int s = 0; s < kOwn; ++s) w[l][s] = 0;
    matrix.add(tall, line, place, w);
    if (base.data) base.add(tall, line, place, w);
#pragma unroll
    for (int l = 0; l < kLines; ++l)
#pragma unroll
      for (int s = 0; s < kOwn; ++s) w[l][s] *= scale;
  }
};

// Grid: chunks, matrices. kWhole: the block owns a line with all its places, and shared memory holds q.
template <int kVectors, bool kWhole, class Real>
__global__ void __launch_bounds__(kMostThreads, kWhole && sizeof(Real) == 4 ? 2 : 1)
    multiply(const GramProduct a, const Addresses at) {
  constexpr int kPanel = kWhole ? kQuad : 64, kWarps = kMostThreads / kWarp, kSums = kQuad * kVectors;
  __shared__ Real of_warps[kPanel / kQuad][kWarps][kSums];
  __shared__ Real y[kPanel][kVectors];
  extern __shared__ uint4 shared[];
  const int64_t i = blockIdx.y;
  const int side = a.side(), longer = a.tall() ? a.rows : a.columns, tile = blockDim.x * kOwn;
  const int begin = blockIdx.x * a.chunk, end = begin + a.chunk < longer ? begin + a.chunk : longer;
  const int mine = threadIdx.x * kOwn;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const Lines<Real> lines(a, at, i, end);

  for (int64_t vector = 0; vector < a.width; vector += kVectors) {
    const Real* q = static_cast<const Real*>(a.q) + (i * a.width + vector) * side;
    Real* out = static_cast<Real*>(a.partials) + ((i * a.chunks + blockIdx.x) * a.width + vector) * side;
    Real z[kVectors][kOwn] = {};
    Real w[kQuad][kOwn];
    if constexpr (kWhole) {  // a thread reads back only what it has brought itself
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        Real x[kOwn];
        load_own(q + j * side, mine, side, x);
        auto* place = reinterpret_cast<Real*>(shared) + j * tile + mine;
        *reinterpret_cast<Pack<Real, kOwn>*>(place) = narrow<Real, kOwn>(x, DType::f32);
      }
    }
    for (int first = begin; first < end; first += kPanel) {
      if constexpr (kWhole) lines.load(first, mine, w);
#pragma unroll 1
      for (int quad = 0; quad < kPanel / kQuad; ++quad) {
        Real sums[kSums] = {};
        if constexpr (kWhole) {
          add_dots<kVectors>(w, [&](int j, Real(&x)[kOwn]) {
            widen(load_pack<Real, kOwn>(shared, j * tile + mine), DType::f32, x);
          }, sums);
        } else {
#pragma unroll 1
          for (int place = mine; place < side; place += tile) {
            lines.load(first + quad * kQuad, place, w);
            add_dots<kVectors>(w, [&](int j, Real(&x)[kOwn]) { load_own(q + j * side, place, side, x); }, sums);
          }
        }
        const Real sum = warp_sums(sums);
        if (lane < kSums) of_warps[quad][warp][lane] = sum;
      }
      __syncthreads();
      for (int k = threadIdx.x; k < kPanel * kVectors; k += blockDim.x) {
        Real sum = 0;
        for (int other = 0; other < warps; ++other) sum += of_warps[k / kSums][other][k % kSums];
        y[k / kVectors][k % kVectors] = sum;
      }
      __syncthreads();
      if constexpr (kWhole) {
        add_lines(w, y, z);
      } else {
#pragma unroll 1
        for (int place = mine; place < side; place += tile) {
#pragma unroll
          for (int j = 0; j < kVectors; ++j) load_own(out + j * side, place, first > begin ? side : 0, z[j]);
#pragma unroll 1
          for (int quad = 0; quad < kPanel / kQuad; ++quad) {
            lines.load(first + quad * kQuad, place, w);
            add_lines(w, y + quad * kQuad, z);
          }
#pragma unroll
          for (int j = 0; j < kVectors; ++j) store_own(out + j * side, place, side, z[j]);
        }
      }
    }
    if constexpr (kWhole) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) store_own(out + j * side, mine, side, z[j]);
    }
  }
}

// Grid: parts of width * side, matrices.
template <class Real>
__global__ void __launch_bounds__(kMostThreads) add_chunks(const GramProduct a, Real* out) {
  const int64_t numbers = a.width * a.side(), i = blockIdx.y, k = int64_t(blockIdx.x) * kMostThreads + threadIdx.x;
  if (k >= numbers) return;
  const Real* partials = static_cast<const Real*>(a.partials) + i * a.chunks * numbers + k;
  double sum = 0;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) sum += partials[chunk * numbers];
  out[i * numbers + k] = sum;
}

template <class Real, int kVectors>
cudaError_t launch(const GramProduct& a, const Addresses& at, Real* out, cudaStream_t stream) {
  const int64_t needed = (a.side() + kOwn * kWarp - 1) / (kOwn * kWarp) * kWarp;
  const bool whole = needed <= kMostThreads;
  const int threads = whole ? needed : kMostThreads;
  const int64_t shared_bytes = whole ? kVectors * kOwn * threads * sizeof(Real) : 0;
  const auto kernel = whole ? multiply<kVectors, true, Real> : multiply<kVectors, false, Real>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error) return error;
  kernel<<<dim3(a.chunks, at.count), threads, shared_bytes, stream>>>(a, at);
  if (error = cudaGetLastError(); error || !out) return error;
  const dim3 sums((a.width * a.side() + kMostThreads - 1) / kMostThreads, at.count);
  add_chunks<Real><<<sums, kMostThreads, 0, stream>>>(a, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gram_product(const GramProduct& a, const Addresses& at, void* out, cudaStream_t stream) {
  if (a.wide) return launch<double, kWidth>(a, at, static_cast<double*>(out), stream);
  return a.width % 8 == 0 ? launch<float, 8>(a, at, static_cast<float*>(out), stream)
                          : launch<float, kWidth>(a, at, static_cast<float*>(out), stream);
}

}  // namespace samerge::gpu
