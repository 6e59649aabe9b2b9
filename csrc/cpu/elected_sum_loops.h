// One block at a time, as weighted_sum: the base goes into an accumulator, the elected sum of the block's vectors is added.
// The products of the first tasks are kept for the sum, those of more tasks are computed again.
#pragma once

#include "../elected_sum.h"
#include "simd.h"
#include "weighted_sum_loops.h"

namespace samerge::SAMERGE_LEVEL {

// As it reads after being stored.
template <class Storage, class Vector = typename Storage::Vector>
SAMERGE_INLINE Vector rounded(Vector v) {
  if constexpr (Storage::kWide) return v;
  typename Storage::Stored numbers[kLanes<Vector>];
  store(numbers, Storage::round(v));
  return Storage::read(numbers);
}

// The product must not become part of a fused multiply-add: vectors that cancel must sum to zero.
template <class Storage, class Vector = typename Storage::Vector>
SAMERGE_INLINE Vector weighted(const typename Storage::Stored* numbers, lane_t<Vector> weight) {
  Vector v = Storage::read(numbers) * weight;
#if defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return rounded<Storage>(v);
}

template <class Storage, class Real = lane_t<typename Storage::Vector>>
void add_elected(const ElectedSum& a, int64_t b, Real* merged) {  // [kBlock]
  using Vector = typename Storage::Vector;
  const auto* block = static_cast<const typename Storage::Stored*>(a.task_vectors) + b * kBlock;
  const auto* weights = static_cast<const Real*>(a.weights);
  const Real scale = Real(a.scale);
  constexpr int64_t kKept = 8;
  for (int64_t i = 0; i < kBlock; i += kLanes<Vector>) {
    Vector kept[kKept], total{};
    for (int64_t t = 0; t < a.num_tasks; ++t) {
      prefetch(block + t * a.task_stride + i + kBlock);
      const Vector v = weighted<Storage>(block + t * a.task_stride + i, weights[t]);
      if (t < kKept) kept[t] = v;
      total += v;
    }
    const Vector sign = total >= 0 ? broadcast<Vector>(1) : broadcast<Vector>(-1);
    Vector sum{}, divisor{};
    for (int64_t t = 0; t < a.num_tasks; ++t) {
      const Vector v = t < kKept ? kept[t] : weighted<Storage>(block + t * a.task_stride + i, weights[t]);
      const auto agrees = v * sign > 0;
      sum += agrees ? v : Vector{};
      divisor += agrees ? broadcast<Vector>(weights[t]) : Vector{};
    }
    if (a.normalize) sum /= divisor == 0 ? broadcast<Vector>(1) : divisor;
    sum = total != total ? total : sum;  // a NaN elects nobody, and shows
    store(merged + i, load<Vector>(merged + i) + sum * scale);
  }
}

template <class Storage, class Real>
void elect_blocks(const ElectedSum& a, const BlockFunctions<Real>& base, int64_t first, int64_t last) {
  alignas(64) Real merged[kBlock];
  for (int64_t b = first; b < last; ++b) {
    base.read(static_cast<const char*>(a.base) + b * base.bytes, merged);
    add_elected<Storage>(a, b, merged);
    base.write(static_cast<char*>(a.out) + b * base.bytes, merged);
  }
}

void elected_sum(const ElectedSum& a, int64_t first, int64_t last) {
  if (a.base_dtype == DType::f64) return elect_blocks<F64>(a, block_functions<F64, double>, first, last);
  constexpr BlockFunctions<float> of[] = {block_functions<F32, float>, block_functions<BF16, float>,
                                          block_functions<F16, float>};
  const auto& base = of[int(a.base_dtype)];
  if (a.task_dtype == DType::f32) elect_blocks<F32>(a, base, first, last);
  if (a.task_dtype == DType::bf16) elect_blocks<BF16>(a, base, first, last);
  if (a.task_dtype == DType::f16) elect_blocks<F16>(a, base, first, last);
}

}  // namespace samerge::SAMERGE_LEVEL
