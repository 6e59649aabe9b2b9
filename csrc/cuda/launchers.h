#pragma once

#include <cuda_runtime_api.h>

#include "../coefficient_grad.h"
#include "../drop.h"
#include "../elected_sum.h"
#include "../gram_product.h"
#include "../magnitudes.h"
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

// Adds to counts, [T, kDigits], how often every digit, the 16 bits from `shift` on, occurs in the rows that have ties, among their
// numbers that begin with the key. Zeros, which are zero kept or not, are left out. There are numbers.
cudaError_t count_digits(const Magnitudes& a, int64_t* counts, int shift, cudaStream_t stream);

// Appends the digit to the key of every row, [T], that has ties, [T], takes off these what is larger, and sets counts back to zero.
// Where digits from `infinity` on occur the key is -1. last: no digit follows. There are rows.
cudaError_t next_digit(int64_t* counts, int64_t* keys, int64_t* ties, int64_t num_rows, int infinity, bool last,
                       cudaStream_t stream);

// Copies numbers to out, [T, n], which may be they, with zeros for what is not kept, and takes off the ties those that were met.
// kept is [T, trimmed_tiles(n)], to work with. There are numbers.
int64_t trimmed_tiles(int64_t count, int bytes);
cudaError_t trim(const Magnitudes& a, void* out, int64_t out_stride, int64_t* kept, cudaStream_t stream);

// There are numbers.
cudaError_t drop(const Drop& a, cudaStream_t stream);

}  // namespace samerge::gpu
