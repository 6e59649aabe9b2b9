// A fault of each kind, to see that it is seen, and the same without it.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime_api.h>

namespace {

constexpr int kThreads = 64;

__global__ void no_barrier(float* x, bool right) {
  __shared__ float y[kThreads];
  y[threadIdx.x] = x[threadIdx.x];
  if (right) __syncthreads();
  x[threadIdx.x] = y[kThreads - 1 - threadIdx.x];
}

__global__ void no_syncwarp(float* x, bool right) {
  __shared__ float y[kThreads];
  y[threadIdx.x] = x[threadIdx.x];
  if (right) __syncwarp();
  x[threadIdx.x] = y[threadIdx.x ^ 1];
}

__global__ void two_blocks_write(float* x, bool right) {
  if (threadIdx.x == 0) x[right ? blockIdx.x : 0] = 1;
}

__global__ void read_then_written(float* x, bool right) {
  __shared__ float y;
  if (threadIdx.x == 0) y = 1;
  __syncthreads();
  const float before = y;
  if (right) __syncthreads();
  if (threadIdx.x == 40) y = 2;
  x[threadIdx.x] = before;
}

__global__ void unequal_barriers(float*, bool right) {
  if (right || threadIdx.x < 32) __syncthreads();
}

__global__ void shuffle_apart(float* x, bool right) {
  if (right || threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void foreign_lane(float* x, bool right) {
  if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_sync(0xffffu, x[threadIdx.x], right ? 15 : 16);
}

__global__ void a_byte_too_far(float* x, bool right) {
  if (threadIdx.x == 0) reinterpret_cast<char*>(x)[kThreads * sizeof(float) - right] = 1;
}

__global__ void before_the_first(float* x, bool right) {
  if (threadIdx.x == 0) x[0] = x[right ? 0 : -1];
}

__global__ void beyond_shared(float* x, bool right) {
  __shared__ float y[kThreads], z[kThreads];
  y[threadIdx.x] = z[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) x[0] = y[kThreads - right];
}

__global__ void beyond_the_launch(float* x, bool right) {
  extern __shared__ float y[];
  y[threadIdx.x + !right] = x[threadIdx.x];
}

__global__ void odd_vector(float* x, bool right) {
  if (threadIdx.x == 0) {
    const float4 v = *reinterpret_cast<const float4*>(x + (right ? 4 : 3));
    x[0] = v.y;
  }
}

__global__ void copy_in_flight(float* x, bool right) {
  __shared__ float y[kThreads];
  __pipeline_memcpy_async(&y[threadIdx.x], &x[threadIdx.x], sizeof(float));
  __pipeline_commit();
  __pipeline_wait_prior(right ? 0 : 1);
  x[threadIdx.x] = y[threadIdx.x];
  __pipeline_wait_prior(0);
}

__global__ void copy_forgotten(float* x, bool right) {
  __shared__ float y[kThreads];
  __pipeline_memcpy_async(&y[threadIdx.x], &x[threadIdx.x], sizeof(float));
  __pipeline_commit();
  if (right) __pipeline_wait_prior(0);
}

__global__ void other_block_of_cluster(float* x, bool right) {
  __shared__ float y;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) y = blockIdx.x;
  if (right)
    cluster.sync();
  else
    __syncthreads();
  if (threadIdx.x == 0) x[blockIdx.x] = *cluster.map_shared_rank(&y, 1 - int(cluster.block_rank()));
  cluster.sync();
}

__global__ void not_global(float* x, bool right) {
  __shared__ float y[kThreads];
  __stwb(right ? x + threadIdx.x : y + threadIdx.x, 1.f);
}

__global__ void torn_sum(float* x, bool right) {
  if (right)
    atomicAdd(x, 1);
  else
    *x += 1;
}

}  // namespace

extern "C" cudaError_t planted(const char* name, float* x, bool right) {  // x [64]
#define PLANTED(kernel, blocks, cluster_blocks)                                                 \
  if (!strcmp(name, #kernel)) {                                                                 \
    cudaLaunchAttribute attribute = {cudaLaunchAttributeClusterDimension};                      \
    attribute.val.clusterDim = {cluster_blocks, 1, 1};                                          \
    cudaLaunchConfig_t config = {blocks, kThreads, kThreads * sizeof(float), 0, &attribute, 1}; \
    return cudaLaunchKernelEx(&config, kernel, x, right);                                       \
  }
  PLANTED(no_barrier, 1, 1)              // race
  PLANTED(no_syncwarp, 1, 1)             // race
  PLANTED(two_blocks_write, 2, 1)        // race
  PLANTED(read_then_written, 1, 1)       // race
  PLANTED(unequal_barriers, 1, 1)        // threads part
  PLANTED(shuffle_apart, 1, 1)           // threads part
  PLANTED(foreign_lane, 1, 1)            // shuffle
  PLANTED(a_byte_too_far, 1, 1)          // write of 1 bytes out of bounds
  PLANTED(before_the_first, 1, 1)        // read of 4 bytes out of bounds
  PLANTED(beyond_shared, 1, 1)           // read of 4 bytes out of bounds
  PLANTED(beyond_the_launch, 1, 1)       // write of 4 bytes out of bounds
  PLANTED(odd_vector, 1, 1)              // read of 16 bytes misaligned
  PLANTED(copy_in_flight, 1, 1)          // race
  PLANTED(copy_forgotten, 1, 1)          // copies are not waited for
  PLANTED(other_block_of_cluster, 2, 2)  // race
  PLANTED(not_global, 1, 1)              // global memory is asked for
  PLANTED(torn_sum, 2, 1)                // race
  return cudaErrorInvalidValue;
}
