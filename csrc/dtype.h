#pragma once

#include <cstdint>

// A function that host and device code share.
#ifdef __CUDACC__
#define SAMERGE_ANYWHERE __host__ __device__ inline
#else
#define SAMERGE_ANYWHERE inline
#endif

namespace samerge {

// How numbers are stored. Arithmetic is in float for the first three, in double for the last.
enum class DType : int { f32, bf16, f16, f64 };

constexpr int64_t kBlock = 1024;  // numbers per block of packed weights; a block belongs to one layer

}  // namespace samerge
