// out[t, i] = factors[t] * numbers[t, i] where a hash of its place and its stretch's key is below thresholds[t], else 0
//
// A block takes a tile of a row, which lies in one stretch. Moves 1 read and 1 write per number.
#include "rows.cuh"

namespace samerge::gpu {
namespace {

constexpr int kThreads = 256;

// Of a tile, so that four accesses of 16 bytes are in flight.
template <class Stored>
constexpr int kTile = 64 * kThreads / sizeof(Stored);

template <class Stored, int kCount>
__global__ void __launch_bounds__(kThreads) drop_some(const Drop a, int64_t tiles, int64_t stretches) {
  using Real = real_t<Stored>;
  constexpr int kPacks = kTile<Stored> / kThreads / kCount;
  const int64_t row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t first = tile * kTile<Stored> + int(threadIdx.x) * kCount;
  const auto* numbers = static_cast<const Stored*>(a.numbers) + row * a.stride;
  auto* out = static_cast<Stored*>(a.out) + row * a.out_stride;
  Pack<Stored, kCount> packs[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) packs[p] = load_some<kCount>(numbers, first + p * kThreads * kCount, a.count);
  const auto key = uint32_t(a.keys[row * stretches + tile * kTile<Stored> / kStretch]);
  const auto threshold = uint32_t(a.thresholds[row]);
  const Real factor = static_cast<const Real*>(a.factors)[row];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t place = first + p * kThreads * kCount;
    Real x[kCount];
    widen(packs[p], a.dtype, x);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      x[k] = uniform(uint32_t(place % kStretch) + k, key) < threshold ? x[k] * factor : Real(0);
    store_some<kCount>(out, place, a.count, narrow<Stored, kCount>(x, a.dtype));
  }
}

}  // namespace

cudaError_t drop(const Drop& a, cudaStream_t stream) {
  const int64_t bytes = bytes_of(a.dtype), stretches = (a.count + kStretch - 1) / kStretch;
  const bool vectors = on_16_bytes(a.numbers, a.stride * bytes) && on_16_bytes(a.out, a.out_stride * bytes);
  const auto run = [&](auto stored, auto count_of) {
    using Stored = decltype(stored);
    static_assert(kStretch % kTile<Stored> == 0);
    const int64_t tiles = (a.count + kTile<Stored> - 1) / kTile<Stored>;
    constexpr int kCount = decltype(count_of)::value;
    drop_some<Stored, kCount><<<a.num_rows * tiles, kThreads, 0, stream>>>(a, tiles, stretches);
    return cudaGetLastError();
  };
  switch (a.dtype) {
    case DType::f64: return with_access(double(), vectors, run);
    case DType::f32: return with_access(float(), vectors, run);
    default: return with_access(uint16_t(), vectors, run);
  }
}

}  // namespace samerge::gpu
