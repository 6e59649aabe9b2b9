// CUDA C++ for g++: in the place of every CUDA header, as much of them as csrc/cuda uses. What is missing does not compile; it
// is added here. What needs to know of other threads is in threads.cpp and memory.cpp.
#pragma once

#include <math.h>

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))
#define EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATED_UNSEEN __attribute__((no_sanitize_thread))  // its accesses are not the kernel's

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define EMULATED_VECTORS(type, name)                       \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  struct alignas(16) name##4 { type x, y, z, w; };
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(float, float)
struct alignas(16) double2 {
  double x, y;
};

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;

namespace emulated {

enum Scope { kThread, kWarp, kBlock, kCluster, kGrid };
constexpr int kBallot = -1, kBarrier = -2;

// Of the thread that asks; the same for all of its life.
uint3 threadIdx() __attribute__((const));
uint3 blockIdx() __attribute__((const));
uint3 blockDim() __attribute__((const));
uint3 gridDim() __attribute__((const));
unsigned block_rank() __attribute__((const));  // in its cluster
unsigned cluster_blocks() __attribute__((const));

void* shared(const void* variable, size_t bytes);  // this block's; without a variable, what the launch asks for
void* shared_of(const void* mine, int rank);       // the same place of another block of the cluster
void meet(Scope scope, const char* file, int line);
// Waits for the lanes of the mask; returns `value` of lane `source`, or a bit for each lane whose value is not 0.
uint64_t exchange(unsigned mask, uint64_t value, int source, const char* file, int line);
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int but_last_groups);
void atomic(const void* place, size_t bytes, const void* pc);  // sees a read and a write that cannot be torn apart

void require_global(const void* place, const char* file, int line);  // of an instruction for global memory alone

constexpr size_t kMostArguments = 4096;  // bytes

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  dim3 cluster;
};
void keep(const Launch& launch, const void* arguments, size_t bytes);
cudaError_t run(const Launch& launch, void (*call)(const void*), const void* closure);
const char* fault();  // what went wrong in the last launch
int attribute(int which);
int resident(int threads, size_t shared_bytes);
cudaError_t allow_shared(const void* kernel, int bytes);

template <class... P, class... A>
EMULATED_UNSEEN cudaError_t run(const Launch& launch, void (*kernel)(P...), const A&... arguments) {
  static_assert((sizeof(P) + ... + 0) <= kMostArguments);
  char bytes[kMostArguments];  // as the device gets them
  size_t size = 0;
  const auto put = [&](const auto& argument) {
    size = (size + alignof(decltype(argument)) - 1) / alignof(decltype(argument)) * alignof(decltype(argument));
    memcpy(bytes + size, &argument, sizeof argument);
    size += sizeof argument;
  };
  (put(static_cast<P>(arguments)), ...);
  keep(launch, bytes, size);
  const auto call = [&]() EMULATED_UNSEEN { kernel(static_cast<P>(arguments)...); };
  const auto invoke = [](const void* closure) EMULATED_UNSEEN { (*static_cast<decltype(&call)>(closure))(); };
  return run(launch, static_cast<void (*)(const void*)>(invoke), static_cast<const void*>(&call));
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments) is rewritten to launch(kernel, grid, …)(arguments).
template <class... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return [=](const auto&... arguments) EMULATED_UNSEEN {
    return run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, {}}, kernel, arguments...);
  };
}

template <class To, class From>
inline To bits(From from) {
  To to = {};
  memcpy(&to, &from, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  return to;
}
template <class T>
inline T from_lane(unsigned mask, T x, int lane, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  return bits<T>(exchange(mask, bits<uint64_t>(x), lane, file, line));
}
inline int lane() { return threadIdx().x % 32; }

template <class T, class Change>
inline EMULATED_UNSEEN T atomically(T* place, Change change) {
  atomic(place, sizeof(T), __builtin_return_address(0));
  const T before = *place;
  *place = change(before);
  return before;
}

}  // namespace emulated

// ------------------------------------------------------------------------------------------------------- device functions
inline void __syncthreads(EMULATED_SITE) { emulated::meet(emulated::kBlock, file, line); }
inline void __syncwarp(unsigned mask = ~0u, EMULATED_SITE) {
  emulated::exchange(mask, 0, emulated::kBarrier, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_SITE) {
  return emulated::exchange(mask, predicate != 0, emulated::kBallot, file, line);
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATED_SITE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
template <class T>
inline T __shfl_sync(unsigned mask, T x, int lane, EMULATED_SITE) {
  return emulated::from_lane(mask, x, lane % 32, file, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int lanes, EMULATED_SITE) {
  return emulated::from_lane(mask, x, emulated::lane() ^ lanes, file, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, int lanes, EMULATED_SITE) {
  const int lane = emulated::lane();
  return emulated::from_lane(mask, x, lane + lanes < 32 ? lane + lanes : lane, file, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, int lanes, EMULATED_SITE) {
  const int lane = emulated::lane();
  return emulated::from_lane(mask, x, lane >= lanes ? lane - lanes : lane, file, line);
}
template <class T, class U>
inline T atomicAdd(T* place, U x) {
  return emulated::atomically(place, [=](T old) { return old + x; });
}
template <class T, class U>
inline T atomicMax(T* place, U x) {
  return emulated::atomically(place, [=](T old) { return old < T(x) ? T(x) : old; });
}
template <class T, class U>
inline T atomicOr(T* place, U x) {
  return emulated::atomically(place, [=](T old) { return old | T(x); });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) { return emulated::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated::bits<unsigned>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {  // without the sign's replication
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <class T>
inline void __stwb(T* place, T x, EMULATED_SITE) {
  emulated::require_global(place, file, line);
  *place = x;
}
template <class T>
inline T __ldg(const T* place) {
  return *place;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

struct __half {
  unsigned short bits;
};
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
// Products that no multiply-add takes up: what g++ sees of them is a register.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+x"(product));
  return product;
}
inline double __dmul_rn(double a, double b) {
  double product = a * b;
  asm("" : "+x"(product));
  return product;
}

inline float __half2float(__half x) { return emulated::bits<_Float16>(x); }
inline __half __float2half_rn(float x) { return emulated::bits<__half>(_Float16(x)); }

struct __nv_bfloat16 {
  unsigned short bits;
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

// asm("name %0, %1;" : "=f"(y) : "f"(x)) is rewritten to y = ptx::name(x).
namespace ptx {
inline float ex2_approx_ftz_f32(float x) {
  const float y = fabsf(x) < 0x1p-126f ? 1 : exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}
}  // namespace ptx

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) { emulated::copy_async(to, from, bytes); }
inline void __pipeline_commit() { emulated::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { emulated::wait_for_copies(groups); }

namespace cooperative_groups {
struct cluster_group {
  void sync(EMULATED_SITE) const { emulated::meet(emulated::kCluster, file, line); }
  unsigned block_rank() const { return emulated::block_rank(); }
  unsigned num_blocks() const { return emulated::cluster_blocks(); }
  template <class T>
  T* map_shared_rank(T* mine, int rank) const {
    return static_cast<T*>(emulated::shared_of(mine, rank));
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

// ---------------------------------------------------------------------------------------------------------- host functions
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
cudaError_t cudaGetLastError();
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = emulated::attribute(which), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared_bytes) {
  return *blocks = emulated::resident(threads, shared_bytes), cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t* config) {
  const int blocks = emulated::attribute(cudaDevAttrMultiProcessorCount) *
                     emulated::resident(config->blockDim.x, config->dynamicSmemBytes);
  return *clusters = blocks / config->attrs[0].val.clusterDim.x, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  return emulated::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  dim3 cluster;
  if (config->numAttrs) cluster.x = config->attrs[0].val.clusterDim.x;
  const void* const address = reinterpret_cast<const void*>(kernel);
  return emulated::run({address, config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster}, kernel,
                       arguments...);
}

// What the wrappers use of torch's CUDA headers.
namespace c10::cuda {
struct CUDAGuard {
  template <class Device>
  explicit CUDAGuard(const Device&) {}
};
using OptionalCUDAGuard = CUDAGuard;
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda
#define C10_CUDA_CHECK(call)                                                                                    \
  do {                                                                                                          \
    if (const cudaError_t error = call) TORCH_CHECK(false, "CUDA error ", int(error), ": ", emulated::fault()); \
  } while (0)
