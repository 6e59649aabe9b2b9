#pragma once

#include "dtype.h"

namespace samerge {

// out[t, l] = sum over i in layer l of grad[i] * task_vectors[t, i].
// The blocks are cut into segments that each lie in one layer; a segment's sums are one row of partials.
struct CoefficientGrad {
  double* partials;              // [segments, T]
  const void* grad;              // [N]
  const void* task_vectors;      // [T, N], rows task_stride apart; codes where task_dtype is i8 or i4
  const int64_t* segment_begin;  // [segments + 1], in blocks; not read by the kernels, whose segments are single blocks
  int64_t num_tasks;             // T
  int64_t task_stride;           // in stored elements: numbers, or bytes of codes
  DType grad_dtype, task_dtype;
  const uint16_t* scales;  // [T, N / kGroup] bf16 of codes, rows scale_stride apart
  int64_t scale_stride;
};

}  // namespace samerge
