// What follows the product in a step of block Lanczos, z = inside known + leaving q', for many matrices at once
//
// Gram-Schmidt in blocks, twice. A round is two kernels: `project` multiplies x, which is z at first, with all known
// vectors; `subtract` takes their multiples from x and multiplies what is left of x with itself. From these products the
// next kernel finds the lower triangular factor of x = factor q' by elimination, and q' by substitution: `project` in the
// second round, and `finish` after it, which writes the results. Elimination squares the condition of the block, so it is
// done in numbers of twice the precision, in which nothing of the products is lost: q' is as good as vector by vector.
//
// The places of the vectors are cut into pieces, a block of threads for each: 128 places up to a side of 2,048, and up to
// 1,024 for longer ones, so that at most 16 pieces' sums are added up, to a side of 16,384. One block for a matrix would
// need no sums and one kernel. But 40 blocks of known vectors of 8,192 floats are 10 MB, read four times: half a
// millisecond at some 50 bytes a cycle, which one multiprocessor may get from the L2 cache, while 128 others wait; the
// product with the four matrices of 8,192 x 8,192 that are searched at once is bound to take 0.36 ms. Four more launches
// cost some 10 microseconds, whatever the number of matrices. (By hand: neither has been measured.)
//
// What all blocks of a matrix need, the sums of the pieces and the factor, each finds for itself: as kernels of their own
// they would be two more launches. All of them add in the same order, which depends on the side alone, and nothing is
// atomic. Moves the known vectors four times, x some ten times and the sums of the pieces, all of which the L2 cache
// holds for matrices up to a side of 4,096.
#include "lines.cuh"
#include "twofold.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = kLanczosWarps * kWarp, kWarps = kLanczosWarps;
constexpr int kTile = kOwn * kWarp;  // places that a warp owns
constexpr int kSlab = 256;           // known vectors whose multiples are in shared memory at once
static_assert(kTile == kPieceTile && kWarps % kMostPieceTiles == 0 && kSlab % (kQuad * kWarps) == 0);

// A block's share of a step: grid x is the piece, y the matrix.
template <class Real>
struct Share {
  using Wide = twice_t<Real>;
  const LanczosStep& a;
  const int64_t i = blockIdx.y, part = i * a.pieces + blockIdx.x, stride = a.stride;
  const int width = a.width, squares = width * width, known = a.known, side = a.side;
  const int begin = blockIdx.x * a.piece;  // of the places that are this block's
  const int places = stride - begin < a.piece ? stride - begin : a.piece;
  Real* const x = static_cast<Real*>(a.x) + i * width * stride + begin;
  const Real* const basis = static_cast<const Real*>(a.basis) + i * a.capacity * stride + begin;

  __device__ Real* dots(int64_t piece) const {
    return static_cast<Real*>(a.dots) + (i * a.pieces + piece) * width * known;
  }
  __device__ Wide* gram(int64_t piece) const { return static_cast<Wide*>(a.gram) + (i * a.pieces + piece) * squares; }
  __device__ Wide* eliminated() const { return static_cast<Wide*>(a.eliminated) + part * squares; }
  __device__ double* sizes() const { return a.sizes + i * kWarps * width; }
  __device__ double* negligible() const { return a.negligible + part * width; }
  __device__ Real* inside(int round) const {
    return static_cast<Real*>(a.inside) + (round * a.batch + i) * width * known;
  }
  __device__ Real* factor(int round) const {
    return static_cast<Real*>(a.factors) + (round * a.batch * a.pieces + part) * squares;
  }
};

// x = z: a thread adds up the chunks of its places.
template <class Real>
__device__ __forceinline__ void add_chunks(const Share<Real>& s) {
  const auto* const partials = static_cast<const Real*>(s.a.partials) + s.i * s.a.chunks * s.width * s.side;
  const int runs = s.places / kOwn;
  for (int k = threadIdx.x; k < s.width * runs; k += kThreads) {
    const int j = k / runs, place = k % runs * kOwn;
    double sums[kOwn] = {};
    for (int64_t chunk = 0; chunk < s.a.chunks; ++chunk) {
      Real z[kOwn];
      load_own(partials + (chunk * s.width + j) * s.side, s.begin + place, s.side, z);
#pragma unroll
      for (int p = 0; p < kOwn; ++p) sums[p] += z[p];
    }
    Real total[kOwn];
#pragma unroll
    for (int p = 0; p < kOwn; ++p) total[p] = sums[p];
    store_pack(s.x + j * s.stride, place, narrow<Real, kOwn>(total, DType::f32));
  }
}

// The factor of a round, from the products of x with itself: x x^T = factor factor^T. A vector of which no more is left than
// rounding leaves of its size, before it was subtracted from, is taken to be nothing: its column is zero. In global memory,
// since the width has no bound.
template <class Real>
__device__ __forceinline__ void factorise(const Share<Real>& s, int round) {
  constexpr double kRounding = sizeof(Real) == 8 ? 0x1p-98 : 0x1p-40;  // of squares
  auto* const left = s.eliminated();
  double* const negligible = s.negligible();
  const int width = s.width, squares = s.squares;
  for (int k = threadIdx.x; k < squares; k += kThreads) {
    if (k % width > k / width) continue;
    auto sum = s.gram(0)[k];
    for (int64_t piece = 1; piece < s.a.pieces; ++piece) sum = sum + s.gram(piece)[k];
    left[k] = sum;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < width; j += kThreads) {
    double sum = rounded(left[j * width + j]);
    for (int w = 0; w < kWarps; ++w) sum += s.sizes()[w * width + j];
    negligible[j] = kRounding * sum;
  }
  __syncthreads();
  const auto is_nothing = [&](int k) { return rounded(left[k * width + k]) <= negligible[k]; };
  for (int k = 0; k < width; ++k) {
    const int rest = width - 1 - k;
    if (!is_nothing(k)) {
      const auto inverse = reciprocal(left[k * width + k]);
      for (int pair = threadIdx.x; pair < rest * rest; pair += kThreads) {
        const int j = k + 1 + pair / rest, l = k + 1 + pair % rest;
        if (l <= j) left[j * width + l] = left[j * width + l] - left[j * width + k] * (left[l * width + k] * inverse);
      }
    }
    __syncthreads();
  }
  Real* const factor = s.factor(round);
  for (int k = threadIdx.x; k < squares; k += kThreads) {
    const int j = k / width, l = k % width;
    factor[k] = l > j || is_nothing(l) ? 0 : rounded(left[k]) / sqrt(rounded(left[l * width + l]));
  }
  __syncthreads();
}

// A vector of length 1 that has nothing to do with any other.
template <class Real>
__device__ __forceinline__ Real arbitrary(uint32_t vector, uint32_t place, int side) {
  uint32_t bits = vector * 2654435761u + place * 2246822519u;
  bits = (bits ^ bits >> 15) * 2917844503u;
  bits = (bits ^ bits >> 13) * 3266489917u;
  return Real(bits >> 31 ? 1 : -1) / Real(sqrt(double(side)));
}

// x = factor q': q' takes the place of x, an arbitrary vector that of nothing. A thread has some places of all vectors.
template <int kVectors, class Real>
__device__ __forceinline__ void orthonormalise(const Share<Real>& s, int round) {
  const Real* const factor = s.factor(round);
  const int width = s.width;
  for (int place = threadIdx.x; place < s.places; place += kThreads) {
    for (int first = 0; first < width; first += kVectors) {
      Real* const x = s.x + first * s.stride + place;
      Real q[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) q[j] = x[j * s.stride];
      for (int l = 0; l < first; ++l) {
        const Real other = s.x[l * s.stride + place];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) q[j] -= factor[(first + j) * width + l] * other;
      }
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const Real* const row = factor + (first + j) * width + first;
#pragma unroll
        for (int l = 0; l < j; ++l) q[j] -= row[l] * q[l];
        if (row[j] != 0)
          q[j] /= row[j];
        else
          q[j] = s.begin + place < s.side ? arbitrary<Real>(s.known + first + j, s.begin + place, s.side) : 0;
        x[j * s.stride] = q[j];
      }
    }
  }
}

// dots = x known^T over a piece, [width / kVectors, known, kVectors]. A warp takes four known vectors at a time; the piece of x
// is in shared memory.
template <class Real, int kVectors, int kRound>
__global__ void __launch_bounds__(kThreads, 2) project(const LanczosStep a) {
  extern __shared__ uint4 shared[];
  const Share<Real> s{a};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, runs = s.places / kOwn;
  Real* const dots = s.dots(blockIdx.x);
  if constexpr (kRound == 0) {
    add_chunks(s);
  } else {
    factorise(s, 0);
    orthonormalise<kVectors>(s, 0);
  }
  for (int first = 0; first < s.width; first += kVectors) {
    __syncthreads();
    for (int k = threadIdx.x; k < kVectors * runs; k += kThreads)
      store_pack_shared(shared, k * kOwn, load_pack<Real, kOwn>(s.x + (first + k / runs) * s.stride, k % runs * kOwn));
    __syncthreads();
    for (int row = warp * kQuad; row < s.known; row += kWarps * kQuad) {
      Real sums[kQuad * kVectors] = {};
      for (int place = lane * kOwn; place < s.places; place += kTile) {
        Real w[kQuad][kOwn];
#pragma unroll
        for (int l = 0; l < kQuad; ++l)
          widen(load_pack<Real, kOwn>(s.basis + (row + l) * s.stride, place), DType::f32, w[l]);
        add_dots<kVectors>(w, [&](int j, Real(&y)[kOwn]) {
          widen(load_pack<Real, kOwn>(shared, j * s.places + place), DType::f32, y);
        }, sums);
      }
      const Real sum = warp_sums(sums);
      if (lane < kQuad * kVectors) dots[first * s.known + row * kVectors + lane] = sum;
    }
  }
}

// x -= inside known over a piece, inside being the sums of the pieces' dots; gram = x x^T of what is left. A warp owns the places
// of a tile and takes every so many of the known vectors, and the block adds what its warps have, in order.
template <class Real, int kVectors, int kRound>
__global__ void __launch_bounds__(kThreads, 2) subtract(const LanczosStep a) {
  __shared__ __align__(16) Real multiples[kSlab][kVectors];
  __shared__ __align__(16) Real of_warps[kWarps * kVectors * kTile];  // [turns, kVectors, piece]
  const Share<Real> s{a};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, tiles = a.piece / kTile, turns = kWarps / tiles;
  const int turn = warp / tiles, mine = warp % tiles * kTile + lane * kOwn, runs = s.places / kOwn;
  for (int vector = 0; vector < s.width; vector += kVectors) {
    Real sums[kVectors][kOwn] = {};
    double squares[1] = {};  // of the multiples of one vector
    for (int slab = 0; slab < s.known; slab += kSlab) {
      const int count = s.known - slab < kSlab ? s.known - slab : kSlab;
      const int at = vector * s.known + slab * kVectors, of_piece = s.width * s.known;
      const Real* const dots = s.dots(0) + at;
      for (int k = threadIdx.x; k < count * kVectors; k += kThreads) {
        Real sum = 0;
#pragma unroll 4
        for (int piece = 0; piece < a.pieces; ++piece) sum += dots[int64_t(piece) * of_piece + k];
        multiples[k / kVectors][k % kVectors] = sum;
        squares[0] += double(sum) * sum;
        if (blockIdx.x == 0) s.inside(kRound)[at + k] = sum;
      }
      __syncthreads();
      if (mine < s.places) {
        for (int row = turn * kQuad; row < count; row += turns * kQuad) {
          Real w[kQuad][kOwn];
#pragma unroll
          for (int l = 0; l < kQuad; ++l)
            widen(load_pack<Real, kOwn>(s.basis + (slab + row + l) * s.stride, mine), DType::f32, w[l]);
          add_lines(w, multiples + row, sums);
        }
      }
      __syncthreads();
    }
    const double of_warp = warp_sums<1, kVectors>(squares);
    if (blockIdx.x == 0 && lane < kVectors) s.sizes()[warp * s.width + vector + lane] = of_warp;
    if (mine < s.places) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
        store_pack_shared(of_warps, (turn * kVectors + j) * a.piece + mine, narrow<Real, kOwn>(sums[j], DType::f32));
    }
    __syncthreads();
    for (int k = threadIdx.x; k < kVectors * runs; k += kThreads) {
      const int j = k / runs, place = k % runs * kOwn;
      Real* const x = s.x + (vector + j) * s.stride;
      auto left = load_pack<Real, kOwn>(x, place);
      for (int other = 0; other < turns; ++other) {
        const auto part = load_pack<Real, kOwn>(of_warps, (other * kVectors + j) * a.piece + place);
#pragma unroll
        for (int p = 0; p < kOwn; ++p) left.numbers[p] -= part.numbers[p];
      }
      store_pack(x, place, left);
    }
    __syncthreads();
  }
  for (int pair = warp; pair < s.squares; pair += kWarps) {
    const int j = pair / s.width, l = pair % s.width;
    if (l > j) continue;
    twice_t<Real> sum = {};
    for (int place = lane; place < s.places; place += kWarp)
      sum = sum + exact_product(s.x[j * s.stride + place], s.x[l * s.stride + place]);
    sum = warp_sum(sum);
    if (lane == 0) s.gram(blockIdx.x)[pair] = sum;
  }
}

// q' = x of the second round, to the basis and to where the next product reads it, and the rows of both results.
template <class Real, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) finish(const LanczosStep a) {
  const Share<Real> s{a};
  factorise(s, 1);
  orthonormalise<kVectors>(s, 1);
  Real* const basis = static_cast<Real*>(a.basis) + (s.i * a.capacity + s.known) * s.stride + s.begin;
  Real* const q = static_cast<Real*>(a.q) + s.i * s.width * s.side + s.begin;
  for (int place = threadIdx.x; place < s.places; place += kThreads) {
    for (int j = 0; j < s.width; ++j) {
      const Real number = s.x[j * s.stride + place];
      basis[j * s.stride + place] = number;
      if (s.begin + place < s.side) q[j * s.side + place] = number;
    }
  }
  const auto inside = [&](int round, int j, int r) {
    return double(s.inside(round)[(j / kVectors * s.known + r) * kVectors + j % kVectors]);
  };
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, every = a.pieces * kThreads;
  for (int64_t k = first; k < s.width * s.known; k += every) {
    const int j = k / s.known, r = k % s.known;
    double sum = inside(0, j, r);
    for (int l = 0; l <= j; ++l) sum += s.factor(0)[j * s.width + l] * inside(1, l, r);
    a.projected[(s.i * a.size + s.known - s.width + j) * a.size + r] = sum;
  }
  for (int64_t k = first; k < s.squares; k += every) {
    const int j = k / s.width, r = k % s.width;
    double sum = 0;
    for (int l = r; l <= j; ++l) sum += double(s.factor(0)[j * s.width + l]) * s.factor(1)[l * s.width + r];
    a.leaving[s.i * s.squares + k] = sum;
  }
}

template <class Real, int kVectors>
cudaError_t launch(const LanczosStep& a, cudaStream_t stream) {
  const dim3 grid(a.pieces, a.batch);
  const int64_t bytes = kVectors * a.piece * sizeof(Real);
  project<Real, kVectors, 0><<<grid, kThreads, bytes, stream>>>(a);
  subtract<Real, kVectors, 0><<<grid, kThreads, 0, stream>>>(a);
  project<Real, kVectors, 1><<<grid, kThreads, bytes, stream>>>(a);
  subtract<Real, kVectors, 1><<<grid, kThreads, 0, stream>>>(a);
  finish<Real, kVectors><<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t orthogonalise(const LanczosStep& a, cudaStream_t stream) {
  if (a.wide) return launch<double, kWidth>(a, stream);
  return a.width % 8 == 0 ? launch<float, 8>(a, stream) : launch<float, kWidth>(a, stream);
}

}  // namespace samerge::gpu
