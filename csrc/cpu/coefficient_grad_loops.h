// One block at a time: the gradient goes into the first-level cache and is multiplied with four task vectors at a time.
// A block's products are summed lane by lane, the lanes and the blocks of a segment in double.
#pragma once

#include "../coefficient_grad.h"
#include "weighted_sum_loops.h"

namespace samerge::SAMERGE_LEVEL {

// sums[k] += grad . block k of kCount, which lie task_stride apart.
template <class Storage, int kCount, class Real = lane_t<typename Storage::Vector>>
SAMERGE_INLINE void dot_some(const typename Storage::Stored* block, int64_t task_stride, const Real* grad, double* sums) {
  using Vector = typename Storage::Vector;
  constexpr int kStep = kLanes<Vector>;
  Vector even[kCount] = {}, odd[kCount] = {};
  for (int64_t i = 0; i < kBlock; i += 2 * kStep) {
    const Vector g = load<Vector>(grad + i), h = load<Vector>(grad + i + kStep);
    for (int k = 0; k < kCount; ++k) {
      prefetch(block + k * task_stride + i + kBlock);
      prefetch(block + k * task_stride + i + kBlock + kStep);
      even[k] += g * Storage::read(block + k * task_stride + i);
      odd[k] += h * Storage::read(block + k * task_stride + i + kStep);
    }
  }
  for (int k = 0; k < kCount; ++k) sums[k] += sum(even[k] + odd[k]);
}

template <class Storage, class Real = lane_t<typename Storage::Vector>>
void dot_blocks(const CoefficientGrad& a, int64_t b, const Real* grad, double* sums) {  // [kBlock], [T]
  const auto* block = static_cast<const typename Storage::Stored*>(a.task_vectors) + b * kBlock;
  for (int64_t t = 0; t < a.num_tasks; t += 4) {
    const int64_t count = a.num_tasks - t < 4 ? a.num_tasks - t : 4;
    const auto* first = block + t * a.task_stride;
    if (count == 4) dot_some<Storage, 4>(first, a.task_stride, grad, sums + t);
    if (count == 3) dot_some<Storage, 3>(first, a.task_stride, grad, sums + t);
    if (count == 2) dot_some<Storage, 2>(first, a.task_stride, grad, sums + t);
    if (count == 1) dot_some<Storage, 1>(first, a.task_stride, grad, sums + t);
  }
}

// As above, of codes: a group's products are summed lane by lane before they are scaled.
template <class Codes, int kCount, class Real = lane_t<typename Codes::Vector>>
SAMERGE_INLINE void dot_some_codes(const uint8_t* block, int64_t task_stride, const uint16_t* scales, int64_t scale_stride,
                                   const Real* grad, double* sums) {
  using Vector = typename Codes::Vector;
  Vector totals[kCount] = {};
  for (int64_t group = 0; group < kBlock / kGroup; ++group) {
    Vector part[kCount] = {};
    for (int k = 0; k < kCount; ++k) prefetch_codes<Codes>(block + k * task_stride, group);
    const Real *first = grad + group * kGroup, *second = first + kGroup / 2;
    for (int64_t i = 0; i < kGroup / 2; i += kLanes<Vector>) {
      const Vector g = load<Vector>(first + i), h = load<Vector>(second + i);
      for (int k = 0; k < kCount; ++k) {
        const Halves<Vector> codes = Codes::read(block + k * task_stride, group, i);
        part[k] += g * codes.first;
        part[k] += h * codes.second;
      }
    }
    for (int k = 0; k < kCount; ++k) totals[k] += part[k] * Real(scale_value(scales[k * scale_stride + group]));
  }
  for (int k = 0; k < kCount; ++k) sums[k] += sum(totals[k]);
}

template <class Codes, class Real = lane_t<typename Codes::Vector>>
void dot_codes(const CoefficientGrad& a, int64_t b, const Real* grad, double* sums) {  // [kBlock], [T]
  const auto* block = static_cast<const uint8_t*>(a.task_vectors) + b * kBlock / kGroup * Codes::kBytes;
  const auto* scales = a.scales + b * (kBlock / kGroup);
  for (int64_t t = 0; t < a.num_tasks; t += 4) {
    const int64_t count = a.num_tasks - t < 4 ? a.num_tasks - t : 4;
    const auto* first = block + t * a.task_stride;
    const auto* scale = scales + t * a.scale_stride;
    if (count == 4) dot_some_codes<Codes, 4>(first, a.task_stride, scale, a.scale_stride, grad, sums + t);
    if (count == 3) dot_some_codes<Codes, 3>(first, a.task_stride, scale, a.scale_stride, grad, sums + t);
    if (count == 2) dot_some_codes<Codes, 2>(first, a.task_stride, scale, a.scale_stride, grad, sums + t);
    if (count == 1) dot_some_codes<Codes, 1>(first, a.task_stride, scale, a.scale_stride, grad, sums + t);
  }
}

template <class Real>
void contract_segments(const CoefficientGrad& a, const BlockFunctions<Real>& read,
                       void (*dot)(const CoefficientGrad&, int64_t, const Real*, double*), int64_t first, int64_t last) {
  alignas(64) Real grad[kBlock];
  for (int64_t segment = first; segment < last; ++segment) {
    double* sums = a.partials + segment * a.num_tasks;  // [T]
    for (int64_t t = 0; t < a.num_tasks; ++t) sums[t] = 0;
    for (int64_t b = a.segment_begin[segment]; b < a.segment_begin[segment + 1]; ++b) {
      read.read(static_cast<const char*>(a.grad) + b * read.bytes, grad);
      dot(a, b, grad, sums);
    }
  }
}

void coefficient_grad(const CoefficientGrad& a, int64_t first, int64_t last) {
  if (a.grad_dtype == DType::f64) {
    constexpr decltype(&dot_blocks<F64>) dot[] = {dot_blocks<F64>, dot_codes<Int8<Double>>, dot_codes<Int4<Double>>};
    const auto dot_of = dot[int(a.task_dtype) - int(DType::f64)];
    return contract_segments<double>(a, block_functions<F64, double>, dot_of, first, last);
  }
  constexpr BlockFunctions<float> read[] = {block_functions<F32, float>, block_functions<BF16, float>,
                                            block_functions<F16, float>};
  constexpr decltype(&dot_blocks<F32>) dot[] = {dot_blocks<F32>, dot_blocks<BF16>,        dot_blocks<F16>,
                                                nullptr,         dot_codes<Int8<Float>>, dot_codes<Int4<Float>>};
  contract_segments<float>(a, read[int(a.grad_dtype)], dot[int(a.task_dtype)], first, last);
}

}  // namespace samerge::SAMERGE_LEVEL
