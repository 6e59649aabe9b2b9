#pragma once

#include <cstdint>

// A function that host and device code share.
#ifdef __CUDACC__
#define SAMERGE_ANYWHERE __host__ __device__ inline
#else
#define SAMERGE_ANYWHERE inline
#endif

namespace samerge {

// How numbers are stored. Arithmetic is in float for the first three, in double for the fourth. The last two are codes of
// task vectors, whose numbers are code * scale: a byte per code; or 64 bytes per kGroup codes, byte j with codes j and j + 64 in
// its low and high half, each plus 8.
enum class DType : int { f32, bf16, f16, f64, i8, i4 };

constexpr int64_t kBlock = 1024;  // numbers per block of packed weights; a block belongs to one layer
constexpr int64_t kGroup = 128;   // codes that share a scale

}  // namespace samerge
