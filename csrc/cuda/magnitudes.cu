// Keeping the numbers of largest magnitude of every row: digits are counted, one is chosen, and after the last the rest is zeroed.
// Everything known of a row stays on the device.
//
// count: a block counts some tiles of the rows in shared memory, a word per digit of 15 bits, and adds what it found to the counts in
// global memory. The first digit has no more than 15 bits; of the later ones, which few numbers take part in, two share a word,
// which is emptied before 16 bits overflow. Where the device has not as much shared memory, numbers are counted in global
// memory. Moves 1 read per number. Sums of integers: the order does not matter.
//
// trim: moves 1 read and 1 write per number, and 1 read of the rows that have some of several equal numbers to keep: their number in
// each tile is counted first, from which follows how many of them a tile may keep.
#include "rows.cuh"

namespace samerge::gpu {
namespace {

constexpr int kMostThreads = 1024, kCounters = 1 << 15, kCountedTile = 16 * kMostThreads;

template <class Bits, int kCount, bool kShared>
__global__ void __launch_bounds__(kMostThreads)
    count(const Magnitudes a, unsigned long long* all_counts, int shift, int64_t tiles) {
  extern __shared__ unsigned counters[];
  const bool is_first = shift == 8 * int(sizeof(Bits)) - 16;
  const int most = is_first ? 1 << 17 : 0xffff / kCountedTile;  // tiles, whose numbers 32 bits or 16 can count
  const int64_t begin = a.num_rows * tiles * blockIdx.x / gridDim.x,
                end = a.num_rows * tiles * (blockIdx.x + 1) / gridDim.x;
  if (kShared) {
    for (int i = threadIdx.x; i < kCounters; i += kMostThreads) counters[i] = 0;
    __syncthreads();
  }
  int held = 0;  // tiles that are counted in shared memory
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / tiles, tile = i % tiles;
    unsigned long long* const counts = all_counts + row * kDigits;
    if (a.ties[row] > 0) {
      const auto* numbers = static_cast<const Bits*>(a.numbers) + row * a.stride;
      const auto key = Bits(a.keys[row]);
      constexpr int kPacks = kCountedTile / kMostThreads / kCount;
      Pack<Bits, kCount> packs[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t first = tile * kCountedTile + (p * kMostThreads + int(threadIdx.x)) * kCount;
        packs[p] = load_some<kCount>(numbers, first, a.count);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const Bits magnitude = packs[p].numbers[k] & kMagnitude<Bits>;
          if (magnitude == 0 || (!is_first && Bits(magnitude >> (shift + 16)) != key)) continue;
          const int digit = int(magnitude >> shift) & int(kDigits - 1);
          if (kShared)
            atomicAdd(&counters[digit % kCounters], digit < kCounters ? 1u : 1u << 16);
          else
            atomicAdd(&counts[digit], 1ull);
        }
      ++held;
    }
    const bool is_last = i + 1 == end || tile + 1 == tiles;
    if (kShared && held && (is_last || held == most)) {
      __syncthreads();
      for (int i = threadIdx.x; i < kCounters; i += kMostThreads) {
        const unsigned word = counters[i], low = is_first ? word : word & 0xffff, high = is_first ? 0 : word >> 16;
        if (low) atomicAdd(&counts[i], low);
        if (high) atomicAdd(&counts[i + kCounters], high);
        counters[i] = 0;
      }
      __syncthreads();
      held = 0;
    }
  }
}

// The sum of x over the threads before this one; in `all` that over all threads of the block, which all take part.
template <class Int>
__device__ __forceinline__ Int sum_before(Int x, Int* all) {
  __shared__ Int sums[kMostThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Int sum = x;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Int below = __shfl_up_sync(kAllLanes, sum, offset);
    sum += lane >= offset ? below : Int(0);
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  Int before = sum - x;
  *all = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
    before += w < warp ? sums[w] : Int(0);
    *all += sums[w];
  }
  __syncthreads();
  return before;
}

// A block chooses the digit of a row: the largest that, with those above it, as many numbers have as are kept. Digits are summed
// up by spans of 64, from the highest on.
__global__ void __launch_bounds__(kMostThreads)
    choose(long long* all_counts, int64_t* keys, int64_t* ties, int infinity, bool is_last_digit) {
  constexpr int kSpan = 64, kSpans = kDigits / kSpan;
  static_assert(kSpans == kMostThreads);
  __shared__ long long spans[kSpans];
  __shared__ long long chosen[3];  // a span; how many are kept of it and those below; whether there is none
  long long* const counts = all_counts + blockIdx.x * kDigits;
  const long long kept = ties[blockIdx.x];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (kept <= 0) return;

  bool is_broken = false;
  for (int i = 0; i < kWarp; ++i) {
    const int span = warp * kWarp + i;
    const int high = int(kDigits) - 1 - span * kSpan - lane, low = high - kWarp;
    const long long x = counts[high], y = counts[low];
    is_broken |= (x && high >= infinity) || (y && low >= infinity);
    const long long sum = warp_sum(x + y);
    if (lane == 0) spans[span] = sum;
  }
  if (threadIdx.x == 0) chosen[0] = kSpans, chosen[1] = kept, chosen[2] = 0;
  __syncthreads();
  if (is_broken) atomicOr(reinterpret_cast<unsigned long long*>(&chosen[2]), 1ull);
  long long all;
  const long long mine = spans[threadIdx.x], above = sum_before(mine, &all);
  if (above < kept && above + mine >= kept) chosen[0] = threadIdx.x, chosen[1] = kept - above;
  __syncthreads();

  const int span = int(chosen[0]);
  const long long left = chosen[1];
  if (span < kSpans && threadIdx.x < kSpan) {
    const int digit = int(kDigits) - 1 - span * kSpan - int(threadIdx.x);
    const long long equal = counts[digit];
    long long larger = 0;
    for (int i = 0; i < int(threadIdx.x); ++i) larger += counts[int(kDigits) - 1 - span * kSpan - i];
    if (!chosen[2] && larger < left && larger + equal >= left) {
      const int64_t key = keys[blockIdx.x] << 16 | digit;
      keys[blockIdx.x] = key;
      ties[blockIdx.x] = is_last_digit && (key == 0 || left - larger == equal) ? -1 : left - larger;
    }
  }
  if (threadIdx.x == 0 && (chosen[2] || span == kSpans)) {
    keys[blockIdx.x] = chosen[2] ? -1 : 0;
    ties[blockIdx.x] = -1;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kDigits; i += kMostThreads) counts[i] = 0;
}

constexpr int kThreads = 256;

// Of a tile, so that four accesses of 16 bytes are in flight.
template <class Bits>
constexpr int kTrimmedTile = 64 * kThreads / sizeof(Bits);

constexpr int64_t kAll = int64_t(1) << 62;

template <class Bits, int kCount>
struct Tile {
  static constexpr int kPacks = kTrimmedTile<Bits> / kThreads / kCount;
  int64_t first, end;  // of the thread's first pack; of the row
  Pack<Bits, kCount> packs[kPacks];

  __device__ __forceinline__ Tile(const Magnitudes& a, int64_t row, int64_t tile)
      : first(tile * kTrimmedTile<Bits> + int(threadIdx.x) * kCount), end(a.count) {
    const auto* numbers = static_cast<const Bits*>(a.numbers) + row * a.stride;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) packs[p] = load_some<kCount>(numbers, place(p), end);
  }
  __device__ __forceinline__ int64_t place(int p) const { return first + p * kThreads * kCount; }
  __device__ __forceinline__ int equal(int p, Bits key) const {
    int found = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) found += place(p) + k < end && (packs[p].numbers[k] & kMagnitude<Bits>) == key;
    return found;
  }
};

// kept is [T, tiles], of a row that has ties the equal numbers of each tile.
template <class Bits, int kCount>
__global__ void __launch_bounds__(kThreads) count_equal(const Magnitudes a, int64_t* kept, int64_t tiles) {
  const int64_t row = blockIdx.x / tiles;
  if (a.ties[row] <= 0) return;
  const Tile<Bits, kCount> tile(a, row, blockIdx.x % tiles);
  const auto key = Bits(a.keys[row]);
  int found = 0, all;
#pragma unroll
  for (int p = 0; p < tile.kPacks; ++p) found += tile.equal(p, key);
  sum_before(found, &all);
  if (threadIdx.x == 0) kept[blockIdx.x] = all;
}

// A block makes of a row's equal numbers in each tile how many of them are kept.
__global__ void __launch_bounds__(kMostThreads) share_ties(int64_t* all_kept, int64_t* ties, int64_t tiles) {
  int64_t* const kept = all_kept + blockIdx.x * tiles;
  int64_t left = ties[blockIdx.x];
  for (int64_t first = 0; first < tiles; first += kMostThreads) {
    const int64_t i = first + threadIdx.x;
    const int64_t equal = left > 0 && i < tiles ? kept[i] : 0;
    int64_t all;
    const int64_t before = sum_before(equal, &all);
    const int64_t allowed = left > before ? left - before : 0;
    if (i < tiles) kept[i] = left < 0 || (left > 0 && equal <= allowed) ? kAll : allowed;
    if (left > 0) left = left > all ? left - all : 0;
  }
  if (threadIdx.x == 0) ties[blockIdx.x] = left;
}

template <class Bits, int kCount>
__global__ void __launch_bounds__(kThreads)
    zero(const Magnitudes a, void* out, int64_t out_stride, const int64_t* kept, int64_t tiles) {
  const int64_t row = blockIdx.x / tiles;
  Tile<Bits, kCount> tile(a, row, blockIdx.x % tiles);
  const auto key = Bits(a.keys[row]);
  const int64_t most = kept[blockIdx.x];
  int64_t met = 0;  // equal numbers of the tile before the packs that are looked at
#pragma unroll
  for (int p = 0; p < tile.kPacks; ++p) {
    int64_t rank = met;  // of the next equal number
    if (most > 0 && most < kAll) {
      int all;
      rank += sum_before(tile.equal(p, key), &all);
      met += all;
    }
    auto& pack = tile.packs[p];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Bits magnitude = pack.numbers[k] & kMagnitude<Bits>;
      const bool is_equal = magnitude == key;
      if (magnitude < key || (is_equal && rank >= most)) pack.numbers[k] = 0;
      rank += is_equal;
    }
    store_some<kCount>(static_cast<Bits*>(out) + row * out_stride, tile.place(p), tile.end, pack);
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Run>
cudaError_t of_bytes(int bytes, bool vectors, const Run& run) {
  switch (bytes) {
    case 8: return with_access(uint64_t(), vectors, run);
    case 4: return with_access(uint32_t(), vectors, run);
    default: return with_access(uint16_t(), vectors, run);
  }
}

}  // namespace

cudaError_t count_digits(const Magnitudes& a, int64_t* counts, int shift, cudaStream_t stream) {
  constexpr int kSharedBytes = kCounters * sizeof(unsigned);
  int device, shared_limit;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error) return error;
  const bool in_shared = kSharedBytes <= shared_limit;
  const int shared_bytes = in_shared ? kSharedBytes : 0;
  return of_bytes(a.bytes, on_16_bytes(a.numbers, a.stride * a.bytes), [&](auto bits, auto count_of) {
    using Bits = decltype(bits);
    constexpr int kCount = decltype(count_of)::value;
    const auto kernel = in_shared ? count<Bits, kCount, true> : count<Bits, kCount, false>;
    const int64_t tiles = divide_up(a.count, kCountedTile);
    int64_t grid;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (!error) error = resident_blocks(kernel, kMostThreads, shared_bytes, a.num_rows * tiles, &grid);
    if (error) return error;
    auto* const words = reinterpret_cast<unsigned long long*>(counts);
    kernel<<<grid, kMostThreads, shared_bytes, stream>>>(a, words, shift, tiles);
    return cudaGetLastError();
  });
}

cudaError_t next_digit(int64_t* counts, int64_t* keys, int64_t* ties, int64_t num_rows, int infinity, bool last,
                       cudaStream_t stream) {
  auto* const words = reinterpret_cast<long long*>(counts);
  choose<<<num_rows, kMostThreads, 0, stream>>>(words, keys, ties, infinity, last);
  return cudaGetLastError();
}

int64_t trimmed_tiles(int64_t count, int bytes) { return divide_up(count, 64 * kThreads / bytes); }

cudaError_t trim(const Magnitudes& a, void* out, int64_t out_stride, int64_t* kept, cudaStream_t stream) {
  const int64_t tiles = trimmed_tiles(a.count, a.bytes);
  const bool vectors = on_16_bytes(a.numbers, a.stride * a.bytes) && on_16_bytes(out, out_stride * a.bytes);
  return of_bytes(a.bytes, vectors, [&](auto bits, auto count_of) {
    using Bits = decltype(bits);
    constexpr int kCount = decltype(count_of)::value;
    count_equal<Bits, kCount><<<a.num_rows * tiles, kThreads, 0, stream>>>(a, kept, tiles);
    cudaError_t error = cudaGetLastError();
    if (error) return error;
    share_ties<<<a.num_rows, kMostThreads, 0, stream>>>(kept, a.ties, tiles);
    if (error = cudaGetLastError(); error) return error;
    zero<Bits, kCount><<<a.num_rows * tiles, kThreads, 0, stream>>>(a, out, out_stride, kept, tiles);
    return cudaGetLastError();
  });
}

}  // namespace samerge::gpu
