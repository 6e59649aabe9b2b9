#pragma once

#include "dtype.h"

namespace samerge {

// out[i] = base[i] + sum over t of coefficients[t, layer(i)] * task_vectors[t, i]
struct WeightedSum {
  void* out;                   // [N]
  const void* base;            // [N]
  const void* task_vectors;    // [T, N], rows task_stride apart; codes where task_dtype is i8 or i4
  const void* coefficients;    // [T, L] float, double for f64
  const int32_t* block_layer;  // [N / kBlock]
  int64_t num_tasks;           // T
  int64_t num_layers;          // L
  int64_t task_stride;         // in stored elements: numbers, or bytes of codes
  DType out_dtype, base_dtype, task_dtype;
  const uint16_t* scales;  // [T, N / kGroup] bf16 of codes, rows scale_stride apart
  int64_t scale_stride;
};

}  // namespace samerge
