#pragma once

#include "dtype.h"

namespace samerge {

// out[i] = base[i] + sum over t of coefficients[t, layer(i)] * task_vectors[t, i]
struct WeightedSum {
  void* out;                   // [N]
  const void* base;            // [N]
  const void* task_vectors;    // [T, N], rows task_stride apart
  const void* coefficients;    // [T, L] float, double for f64
  const int32_t* block_layer;  // [N / kBlock]
  int64_t num_tasks;           // T
  int64_t num_layers;          // L
  int64_t task_stride;         // in numbers
  DType out_dtype, base_dtype, task_dtype;
};

}  // namespace samerge
