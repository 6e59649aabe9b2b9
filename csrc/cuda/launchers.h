#pragma once

#include <cuda_runtime_api.h>

#include "../coefficient_grad.h"
#include "../elected_sum.h"
#include "../gram_product.h"
#include "../moments.h"
#include "../softmax_kl.h"
#include "../weighted_sum.h"

// The kernels' entry points. All pointers are on the current device. They launch on the stream and return at once, allocate
// nothing and never wait for the device, so they can be captured in a CUDA graph.

namespace samerge::gpu {

// Vectors, and the rows of task_vectors, begin at multiples of 16 bytes. A block whose layer is not in 0 ... L - 1 becomes NaN.
cudaError_t weighted_sum(const WeightedSum& a, int64_t num_blocks, cudaStream_t stream);

// Every block is a segment: partials is [num_blocks, T] and segment_begin is not read. out is [T, L] float, double for f64.
// Alignment as above.
cudaError_t coefficient_grad(const CoefficientGrad& a, void* out, const int32_t* block_layer, int64_t num_blocks,
                             int64_t num_layers, cudaStream_t stream);

// Alignment as above.
cudaError_t elected_sum(const ElectedSum& a, int64_t num_blocks, cudaStream_t stream);

// A row whose num_classes is not in 1 ... V gets loss and gradient NaN.
cudaError_t softmax_kl(const SoftmaxKl& a, cudaStream_t stream);

// Matrices whose addresses travel with a launch: the first `count` of the two lists.
struct Addresses {
  static constexpr int kMost = 64;
  const void* matrices[kMost];
  const void* bases[kMost];
  int count;
};

// a.matrices and a.bases are not read but for whether bases is null; the other members begin at the first of the matrices.
// Chunks are multiples of four. out is [count, width, side].
cudaError_t gram_product(const GramProduct& a, const Addresses& at, void* out, cudaStream_t stream);

// As above. out is [count, 4].
cudaError_t moments(const MomentsCall& a, const Addresses& at, double* out, cudaStream_t stream);

}  // namespace samerge::gpu
