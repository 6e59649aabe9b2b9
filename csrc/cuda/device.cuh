// What the kernels share: numbers that move 16 bytes at a time, and the size of a grid that stays on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../dtype.h"
#include "launchers.h"

namespace samerge::gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Numbers are stored as float, double or the bits of a 16-bit format, which of the two being known only at run time: that
// costs one uniform branch and spares half of all instantiations.
template <class Stored>
struct Arithmetic {
  using Real = float;
};
template <>
struct Arithmetic<double> {
  using Real = double;
};
template <class Stored>
using real_t = typename Arithmetic<Stored>::Real;

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Of a number, not of a code.
SAMERGE_ANYWHERE int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

SAMERGE_ANYWHERE bool on_16_bytes(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

// kCount numbers that one access moves, or two where they are more than 16 bytes.
template <class Stored, int kCount>
union Pack {
  static constexpr int kBytes = kCount * sizeof(Stored), kWordBytes = kBytes < 16 ? kBytes : 16;
  using Word = typename gpu::Word<kWordBytes>::type;
  Stored numbers[kCount];
  Word words[kBytes / kWordBytes];
};

template <class Stored, int kCount>
__device__ __forceinline__ Pack<Stored, kCount> load_pack(const void* data, int64_t first) {
  using P = Pack<Stored, kCount>;
  const auto* words = reinterpret_cast<const typename P::Word*>(static_cast<const Stored*>(data) + first);
  P pack;
#pragma unroll
  for (int w = 0; w < P::kBytes / P::kWordBytes; ++w) pack.words[w] = words[w];
  return pack;
}

// In global memory alone: told outright, since the compiler takes an assignment apart into stores of four bytes.
template <class Stored, int kCount>
__device__ __forceinline__ void store_pack(void* data, int64_t first, const Pack<Stored, kCount>& pack) {
  using P = Pack<Stored, kCount>;
  auto* words = reinterpret_cast<typename P::Word*>(static_cast<Stored*>(data) + first);
#pragma unroll
  for (int w = 0; w < P::kBytes / P::kWordBytes; ++w) __stwb(words + w, pack.words[w]);
}

template <class Stored, int kCount>
__device__ __forceinline__ void store_pack_shared(void* data, int64_t first, const Pack<Stored, kCount>& pack) {
  using P = Pack<Stored, kCount>;
  auto* words = reinterpret_cast<typename P::Word*>(static_cast<Stored*>(data) + first);
#pragma unroll
  for (int w = 0; w < P::kBytes / P::kWordBytes; ++w) words[w] = pack.words[w];
}

template <class Stored, int kCount>
__device__ __forceinline__ void widen(const Pack<Stored, kCount>& pack, DType dtype, real_t<Stored>* x) {
  if constexpr (sizeof(Stored) > 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = pack.numbers[k];
  } else if (dtype == DType::f16) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = __half2float(__ushort_as_half(pack.numbers[k]));
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = __uint_as_float(uint32_t(pack.numbers[k]) << 16);
  }
}

// Rounds to the nearest, ties to even.
template <class Stored, int kCount>
__device__ __forceinline__ Pack<Stored, kCount> narrow(const real_t<Stored>* x, DType dtype) {
  Pack<Stored, kCount> pack;
  if constexpr (sizeof(Stored) > 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) pack.numbers[k] = x[k];
  } else if (dtype == DType::f16) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) pack.numbers[k] = __half_as_ushort(__float2half_rn(x[k]));
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) pack.numbers[k] = __bfloat16_as_ushort(__float2bfloat16_rn(x[k]));
  }
  return pack;
}

// Eight floats of a thread are two accesses of 16 bytes. So that either touches whole sectors of 32 bytes, two neighbouring
// threads, whose numbers are adjacent, access each sector together: the first of their numbers belong to the even one, and
// each trades what is the other's. All lanes take part.
__device__ __forceinline__ void trade(float (&x)[8]) {
  const bool odd = threadIdx.x % 2;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float got = __shfl_xor_sync(kAllLanes, odd ? x[k] : x[k + 4], 1);
    x[k] = odd ? got : x[k];
    x[k + 4] = odd ? x[k + 4] : got;
  }
}

__device__ __forceinline__ int64_t place_in_sector(int64_t first, int half) {
  return first + 8 * half - (threadIdx.x % 2 ? 4 : 0);
}

template <int kCount>
__device__ __forceinline__ void load_floats(const void* data, int64_t first, float (&x)[kCount]) {
  if constexpr (kCount == 8) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      widen(load_pack<float, 4>(data, place_in_sector(first, half)), DType::f32, x + 4 * half);
    trade(x);
  } else {
    widen(load_pack<float, kCount>(data, first), DType::f32, x);
  }
}

template <int kCount>
__device__ __forceinline__ void store_floats(void* data, int64_t first, const float (&x)[kCount]) {
  if constexpr (kCount == 8) {
    float traded[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) traded[k] = x[k];
    trade(traded);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_pack(data, place_in_sector(first, half), narrow<float, 4>(traded + 4 * half, DType::f32));
  } else {
    store_pack(data, first, narrow<float, kCount>(x, DType::f32));
  }
}

// kCount numbers of a vector of any dtype: for the one or two streams beside T task vectors.
template <int kCount>
__device__ __forceinline__ void load(const void* data, DType dtype, int64_t first, float (&x)[kCount]) {
  if (dtype == DType::f32)
    load_floats(data, first, x);
  else
    widen(load_pack<uint16_t, kCount>(data, first), dtype, x);
}

template <int kCount>
__device__ __forceinline__ void load(const void* data, DType dtype, int64_t first, double (&x)[kCount]) {
  widen(load_pack<double, kCount>(data, first), dtype, x);
}

template <int kCount>
__device__ __forceinline__ void store(void* data, DType dtype, int64_t first, const float (&x)[kCount]) {
  if (dtype == DType::f32)
    store_floats(data, first, x);
  else
    store_pack(data, first, narrow<uint16_t, kCount>(x, dtype));
}

template <int kCount>
__device__ __forceinline__ void store(void* data, DType dtype, int64_t first, const double (&x)[kCount]) {
  store_pack(data, first, narrow<double, kCount>(x, dtype));
}

// Codes of task vectors (see DType), eight bytes at a time: a piece is kRuns runs of eight numbers that lie kGroup / 2 apart.
template <int kBits>
struct Codes {
  static constexpr int kPieces = kBlock * kBits / 64, kRuns = 8 / kBits, kRun = 8;
  using Piece = uint2;

  // The first number of a block's piece.
  static __device__ __forceinline__ int first(int piece) {
    return kBits == 8 ? piece * 8 : piece / 8 * int(kGroup) + piece % 8 * 8;
  }

  static __device__ __forceinline__ Piece load(const void* codes, int64_t row, int64_t block,
                                               int piece) {  // row: its first byte
    return reinterpret_cast<const Piece*>(static_cast<const char*>(codes) + row + block * (kBlock * kBits / 8))[piece];
  }

  // A byte becomes the low bits of 2^23, which is faster than a conversion.
  static __device__ __forceinline__ void values(Piece piece, int run, float (&x)[kRun]) {
    constexpr float kOffset = 8388608.f + (kBits == 8 ? 128 : 8);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const unsigned word = j < 4 ? piece.x : piece.y;
      const unsigned bytes = kBits == 8 ? word ^ 0x80808080u : word >> 4 * run & 0x0f0f0f0fu;
      x[j] = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7650 | j % 4)) - kOffset;
    }
  }
};

__device__ __forceinline__ float scale_value(const uint16_t* scales, int64_t place) {
  return __uint_as_float(uint32_t(scales[place]) << 16);
}

// The same sum in every lane, always added in the same order.
template <class Real>
__device__ __forceinline__ Real warp_sum(Real x) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// As many blocks of threads as the device runs at once, or as there is work for.
template <class Kernel>
cudaError_t resident_blocks(Kernel kernel, int threads, int64_t shared_bytes, int64_t work, int64_t* blocks) {
  int device, processors, per_processor;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes);
  if (error) return error;
  const int64_t resident = int64_t(processors) * (per_processor > 0 ? per_processor : 1);
  *blocks = work < resident ? work : resident;
  return cudaSuccess;
}

}  // namespace samerge::gpu
