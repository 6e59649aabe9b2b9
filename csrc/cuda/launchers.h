#pragma once

#include <cuda_runtime_api.h>

#include "../coefficient_grad.h"
#include "../drop.h"
#include "../elected_sum.h"
#include "../gram_product.h"
#include "../lanczos.h"
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
// Chunks are multiples of four. out is [count, width, side], or null where the sums of chunks are all that is wanted.
cudaError_t gram_product(const GramProduct& a, const Addresses& at, void* out, cudaStream_t stream);

// As above. out is [count, 4].
cudaError_t moments(const MomentsCall& a, const Addresses& at, double* out, cudaStream_t stream);

// A step of all matrices, and what its kernels hand on. Twice is double, and two of them where Real is double.
struct LanczosStep : Lanczos {
  int64_t batch;
  int64_t piece, pieces;  // places of the vectors that a block takes, and how many of these there are
  void* x;                // [B, width, stride] Real: what becomes q'
  void* dots;             // [B, pieces, width * known] Real
  void* inside;           // [2, B, width * known] Real: their sums, of both rounds
  void* gram;             // [B, pieces, width, width] Twice
  void* eliminated;       // [B, pieces, width, width] Twice
  double* sizes;          // [B, kLanczosWarps, width]: the squares of inside
  double* negligible;     // [B, pieces, width]
  void* factors;          // [2, B, pieces, width, width] Real
};

// A piece is as short as leaves 16 pieces of a vector or fewer, but no longer than 1,024 places. It depends on the length of the
// vectors alone, and with it the order of every sum.
constexpr int kLanczosWarps = 8;
constexpr int64_t kPieceTile = 128, kMostPieceTiles = 8, kPieces = 16;

inline int64_t lanczos_piece(int64_t stride) {
  int64_t tiles = 1;
  while (tiles < kMostPieceTiles && stride > kPieces * tiles * kPieceTile) tiles *= 2;
  return tiles * kPieceTile;
}

// What follows the product; a.chunks of its partials are added up. The basis begins at a multiple of 16 bytes.
cudaError_t orthogonalise(const LanczosStep& a, cudaStream_t stream);

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
