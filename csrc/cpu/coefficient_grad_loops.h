// One block at a time: the gradient goes into the first-level cache and is multiplied with four task vectors at a time. Two
// vectors of bf16 are read as the numbers at even places and those at odd places, so the gradient is put in that order too.
// A block's products are summed lane by lane, the lanes and the blocks of a segment in double.
#pragma once

#include "../coefficient_grad.h"
#include "weighted_sum_loops.h"

namespace samerge::SAMERGE_LEVEL {

template <class Storage>
constexpr bool kInPairs = false;
template <>
constexpr bool kInPairs<BF16> = true;

template <class Storage>
SAMERGE_INLINE Halves<typename Storage::Vector> read_two(const typename Storage::Stored* p) {
  if constexpr (kInPairs<Storage>)
    return Storage::read_pairs(p);
  else
    return {Storage::read(p), Storage::read(p + kLanes<typename Storage::Vector>)};
}

template <class Storage>
SAMERGE_INLINE void prefetch_two(const typename Storage::Stored* p) {
  prefetch(p);
  if (Storage::kWide) prefetch(p + kLanes<typename Storage::Vector>);
}

// A block of the gradient as bf16 task vectors want it.
template <class Storage>
void read_block_pairs(const void* source, float* grad) {  // [kBlock], [kBlock]
  constexpr int kStep = kLanes<Float>;
  const auto* numbers = static_cast<const typename Storage::Stored*>(source);
  for (int64_t i = 0; i < kBlock; i += 2 * kStep) {
    prefetch_two<Storage>(numbers + i + kBlock);
    auto two = read_two<Storage>(numbers + i);
    if constexpr (!kInPairs<Storage>) two = split_pairs(two.first, two.second);
    store(grad + i, two.first);
    store(grad + i + kStep, two.second);
  }
}

// sums[k] += grad . block k of kCount, which lie task_stride apart.
template <class Storage, int kCount, class Real = lane_t<typename Storage::Vector>>
SAMERGE_INLINE void dot_some(const typename Storage::Stored* block, int64_t task_stride, const Real* grad,
                             double* sums) {
  using Vector = typename Storage::Vector;
  constexpr int kStep = kLanes<Vector>;
  Halves<Vector> totals[kCount] = {};
  for (int64_t i = 0; i < kBlock; i += 2 * kStep) {
    const Vector g = load<Vector>(grad + i), h = load<Vector>(grad + i + kStep);
    for (int k = 0; k < kCount; ++k) {
      prefetch_two<Storage>(block + k * task_stride + i + kBlock);
      const auto two = read_two<Storage>(block + k * task_stride + i);
      totals[k].first += g * two.first;
      totals[k].second += h * two.second;
    }
  }
  for (int k = 0; k < kCount; ++k) sums[k] += sum(totals[k].first + totals[k].second);
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
SAMERGE_INLINE void dot_some_codes(const uint8_t* block, int64_t task_stride, const uint16_t* scales,
                                   int64_t scale_stride, const Real* grad, double* sums) {
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
void contract_segments(const CoefficientGrad& a, void (*read)(const void*, Real*), int64_t bytes,  // of a block of grad
                       void (*dot)(const CoefficientGrad&, int64_t, const Real*, double*), int64_t first,
                       int64_t last) {
  alignas(64) Real grad[kBlock];
  for (int64_t segment = first; segment < last; ++segment) {
    double* sums = a.partials + segment * a.num_tasks;  // [T]
    for (int64_t t = 0; t < a.num_tasks; ++t) sums[t] = 0;
    for (int64_t b = a.segment_begin[segment]; b < a.segment_begin[segment + 1]; ++b) {
      read(static_cast<const char*>(a.grad) + b * bytes, grad);
      dot(a, b, grad, sums);
    }
  }
}

void coefficient_grad(const CoefficientGrad& a, int64_t first, int64_t last) {
  if (a.grad_dtype == DType::f64) {
    constexpr decltype(&dot_blocks<F64>) dot[] = {dot_blocks<F64>, dot_codes<Int8<Double>>, dot_codes<Int4<Double>>};
    const auto dot_of = dot[int(a.task_dtype) - int(DType::f64)];
    return contract_segments<double>(a, read_block<F64>, kBlock * sizeof(double), dot_of, first, last);
  }
  constexpr decltype(&read_block<F32>) read[][3] = {
      {read_block<F32>, read_block<BF16>, read_block<F16>},
      {read_block_pairs<F32>, read_block_pairs<BF16>, read_block_pairs<F16>}};
  constexpr decltype(&dot_blocks<F32>) dot[] = {dot_blocks<F32>, dot_blocks<BF16>,       dot_blocks<F16>,
                                                nullptr,         dot_codes<Int8<Float>>, dot_codes<Int4<Float>>};
  const int64_t bytes = kBlock * (a.grad_dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t));
  const auto read_of = read[a.task_dtype == DType::bf16][int(a.grad_dtype)];
  contract_segments<float>(a, read_of, bytes, dot[int(a.task_dtype)], first, last);
}

}  // namespace samerge::SAMERGE_LEVEL
