// One block at a time: the base goes into an accumulator that stays in the first-level cache, four task vectors at a
// time are added, and the sum is written in the dtype of the output. So any mix of dtypes needs only one loop per dtype.
// A block is a page of fp32, at whose end the processor's own prefetching stops: whoever reads a block fetches the one after.
#pragma once

#include "../weighted_sum.h"
#include "codes.h"

namespace samerge::SAMERGE_LEVEL {

template <class Storage, class Real = lane_t<typename Storage::Vector>>
void read_block(const void* source, Real* sum) {  // [kBlock], [kBlock]
  using Vector = typename Storage::Vector;
  const auto* numbers = static_cast<const typename Storage::Stored*>(source);
  for (int64_t i = 0; i < kBlock; i += kLanes<Vector>) {
    prefetch(numbers + i + kBlock);
    store(sum + i, Storage::read(numbers + i));
  }
}

template <class Storage, bool kStream, class Real = lane_t<typename Storage::Vector>>
void write_block(void* target, const Real* sum) {  // [kBlock], [kBlock]
  using Vector = typename Storage::Vector;
  auto* numbers = static_cast<typename Storage::Stored*>(target);
  for (int64_t i = 0; i < kBlock; i += kLanes<Vector>) {
    const auto rounded = Storage::round(load<Vector>(sum + i));
    if constexpr (kStream)
      stream(numbers + i, rounded);
    else
      store(numbers + i, rounded);
  }
}

// sum += coefficients[k] * block k of kCount, which lie task_stride apart.
template <class Storage, int kCount, class Real = lane_t<typename Storage::Vector>>
SAMERGE_INLINE void add_some(const typename Storage::Stored* block, int64_t task_stride, const Real* coefficients,
                             Real* sum) {
  using Vector = typename Storage::Vector;
  for (int64_t i = 0; i < kBlock; i += kLanes<Vector>) {
    Vector v = load<Vector>(sum + i);
    for (int k = 0; k < kCount; ++k) {
      prefetch(block + k * task_stride + i + kBlock);
      v += Storage::read(block + k * task_stride + i) * coefficients[k];
    }
    store(sum + i, v);
  }
}

template <class Storage, class Real = lane_t<typename Storage::Vector>>
void add_blocks(const WeightedSum& a, int64_t b, Real* sum) {
  const auto* block = static_cast<const typename Storage::Stored*>(a.task_vectors) + b * kBlock;
  const auto* coefficient = static_cast<const Real*>(a.coefficients) + a.block_layer[b];
  for (int64_t t = 0; t < a.num_tasks; t += 4) {
    Real some[4];
    const int64_t count = a.num_tasks - t < 4 ? a.num_tasks - t : 4;
    for (int64_t k = 0; k < count; ++k) some[k] = coefficient[(t + k) * a.num_layers];
    const auto* first = block + t * a.task_stride;
    if (count == 4) add_some<Storage, 4>(first, a.task_stride, some, sum);
    if (count == 3) add_some<Storage, 3>(first, a.task_stride, some, sum);
    if (count == 2) add_some<Storage, 2>(first, a.task_stride, some, sum);
    if (count == 1) add_some<Storage, 1>(first, a.task_stride, some, sum);
  }
}

// As above, of codes.
template <class Codes, int kCount, class Real = lane_t<typename Codes::Vector>>
SAMERGE_INLINE void add_some_codes(const uint8_t* block, int64_t task_stride, const uint16_t* scales,
                                   int64_t scale_stride, const Real* coefficients, Real* sum) {
  using Vector = typename Codes::Vector;
  for (int64_t group = 0; group < kBlock / kGroup; ++group) {
    Real factors[kCount];
    for (int k = 0; k < kCount; ++k) {
      factors[k] = coefficients[k] * scale_value(scales[k * scale_stride + group]);
      prefetch_codes<Codes>(block + k * task_stride, group);
    }
    Real *first = sum + group * kGroup, *second = first + kGroup / 2;
    for (int64_t i = 0; i < kGroup / 2; i += kLanes<Vector>) {
      Vector v = load<Vector>(first + i), w = load<Vector>(second + i);
      for (int k = 0; k < kCount; ++k) {
        const Halves<Vector> codes = Codes::read(block + k * task_stride, group, i);
        v += codes.first * factors[k];
        w += codes.second * factors[k];
      }
      store(first + i, v);
      store(second + i, w);
    }
  }
}

template <class Codes, class Real = lane_t<typename Codes::Vector>>
void add_codes(const WeightedSum& a, int64_t b, Real* sum) {
  const auto* block = static_cast<const uint8_t*>(a.task_vectors) + b * kBlock / kGroup * Codes::kBytes;
  const auto* scales = a.scales + b * (kBlock / kGroup);
  const auto* coefficient = static_cast<const Real*>(a.coefficients) + a.block_layer[b];
  for (int64_t t = 0; t < a.num_tasks; t += 4) {
    Real some[4];
    const int64_t count = a.num_tasks - t < 4 ? a.num_tasks - t : 4;
    for (int64_t k = 0; k < count; ++k) some[k] = coefficient[(t + k) * a.num_layers];
    const auto* first = block + t * a.task_stride;
    const auto* scale = scales + t * a.scale_stride;
    if (count == 4) add_some_codes<Codes, 4>(first, a.task_stride, scale, a.scale_stride, some, sum);
    if (count == 3) add_some_codes<Codes, 3>(first, a.task_stride, scale, a.scale_stride, some, sum);
    if (count == 2) add_some_codes<Codes, 2>(first, a.task_stride, scale, a.scale_stride, some, sum);
    if (count == 1) add_some_codes<Codes, 1>(first, a.task_stride, scale, a.scale_stride, some, sum);
  }
}

template <class Real>
struct BlockFunctions {
  void (*read)(const void*, Real*);
  void (*add)(const WeightedSum&, int64_t, Real*);
  void (*write)(void*, const Real*);
  void (*stream)(void*, const Real*);
  int64_t bytes;  // of a block
};

template <class Storage, class Real>
constexpr BlockFunctions<Real> block_functions = {read_block<Storage>, add_blocks<Storage>, write_block<Storage, false>,
                                                  write_block<Storage, true>,
                                                  int64_t(sizeof(typename Storage::Stored)) * kBlock};

template <class Real>
void merge_blocks(const WeightedSum& a, const BlockFunctions<Real>& base,
                  void (*add)(const WeightedSum&, int64_t, Real*), const BlockFunctions<Real>& out, int64_t first,
                  int64_t last, bool streamed) {
  alignas(64) Real sum[kBlock];
  const auto write = streamed ? out.stream : out.write;
  for (int64_t b = first; b < last; ++b) {
    base.read(static_cast<const char*>(a.base) + b * base.bytes, sum);
    add(a, b, sum);
    write(static_cast<char*>(a.out) + b * out.bytes, sum);
  }
  if (streamed) fence();
}

void weighted_sum(const WeightedSum& a, int64_t first, int64_t last, bool streamed) {
  if (a.base_dtype == DType::f64) {
    constexpr auto wide = block_functions<F64, double>;
    constexpr decltype(wide.add) add[] = {wide.add, add_codes<Int8<Double>>, add_codes<Int4<Double>>};
    return merge_blocks<double>(a, wide, add[int(a.task_dtype) - int(DType::f64)], wide, first, last, streamed);
  }
  constexpr BlockFunctions<float> of[] = {block_functions<F32, float>, block_functions<BF16, float>,
                                          block_functions<F16, float>};
  constexpr decltype(of[0].add) add[] = {
      of[0].add, of[1].add, of[2].add, nullptr, add_codes<Int8<Float>>, add_codes<Int4<Float>>};
  merge_blocks<float>(a, of[int(a.base_dtype)], add[int(a.task_dtype)], of[int(a.out_dtype)], first, last, streamed);
}

}  // namespace samerge::SAMERGE_LEVEL
