#pragma once

#include "../coefficient_grad.h"
#include "../drop.h"
#include "../elected_sum.h"
#include "../gram_product.h"
#include "../lanczos.h"
#include "../magnitudes.h"
#include "../moments.h"
#include "../row_products.h"
#include "../softmax_kl.h"
#include "../weighted_sum.h"

namespace samerge {

// The loops, compiled once for every instruction level. Each works on a range of its outermost index, in one thread.
struct Loops {
  // streamed: writes past the caches; needs out aligned to 64 bytes.
  void (*weighted_sum)(const WeightedSum&, int64_t first_block, int64_t last_block, bool streamed);
  void (*coefficient_grad)(const CoefficientGrad&, int64_t first_segment, int64_t last_segment);
  // scratch: room for exponentials, [rows, chunks * kSoftmaxKlChunk] and [rows, chunks] for their maxima, where a row is the
  // student's or a teacher's; or null. streamed: as above; needs every row of grad aligned to 64 bytes.
  void (*softmax_kl)(const SoftmaxKl&, int64_t first_row, int64_t last_row, void* scratch, bool streamed);
  void (*moments)(const MomentsCall&, int64_t first_segment, int64_t last_segment);
  // Returns the bytes of scratch, at a multiple of 64, that a range needs; an empty range may pass none.
  int64_t (*gram_product)(const GramProduct&, int64_t first_chunk, int64_t last_chunk, void* scratch);
  int64_t (*orthogonalise)(const Lanczos&, int64_t first_matrix, int64_t last_matrix, void* scratch);  // likewise
  void (*elected_sum)(const ElectedSum&, int64_t first_block, int64_t last_block);
  // Magnitudes are compared as bits, sign aside, of numbers of 2, 4 or 8 bytes. Adds to counts, [kDigits], how often every digit
  // occurs, the 16 bits from `shift` on; of numbers whose higher bits are `prefix`, or of all where that is negative.
  void (*count_digits)(const void* numbers, int64_t count, int bytes, int shift, int64_t prefix, int64_t* counts);
  // Copies with zeros for what is smaller than key, and for what equals it after the first `ties`, or for nothing of that where ties
  // is negative; out may be the numbers. Returns what is left of ties.
  int64_t (*trim)(void* out, const void* numbers, int64_t count, int bytes, uint64_t key, int64_t ties);
  void (*drop)(const Drop&, int64_t row, int64_t stretch);
  // Both return the bytes of scratch as gram_product does.
  int64_t (*rows_times_transposed)(const RowProducts&, int64_t first_slab, int64_t last_slab, void* scratch);
  int64_t (*add_rows_times)(const RowProducts&, int64_t first_unit, int64_t last_unit, void* scratch);
};

constexpr int64_t kSoftmaxKlChunk = 1024;

extern const Loops portable_loops;  // level_portable.cpp
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAMERGE_X86_LEVELS 1
extern const Loops avx2_loops;    // level_avx2.cpp
extern const Loops avx512_loops;  // level_avx512.cpp
#endif

// The loops in force: the best level that this machine runs, or the one that set_cpu_level or SAMERGE_CPU_LEVEL names.
const Loops& loops();

const char* cpu_level();
void set_cpu_level(const char* name);  // "auto" for the best; throws std::invalid_argument, naming those that run here

}  // namespace samerge
