#pragma once

#include "dtype.h"

namespace samerge {

// With v[t, i] = weights[t] * task_vectors[t, i], rounded to the task vectors' dtype, and A(i) the t whose v[t, i] has the
// sign of sum over t of v[t, i] (plus where that is 0):
// out[i] = base[i] + scale * sum over A(i) of v[t, i] / d,  d = sum over A(i) of weights[t] where normalize is set, else 1
struct ElectedSum {
  void* out;                 // [N], of the base's dtype
  const void* base;          // [N]
  const void* task_vectors;  // [T, N], rows task_stride apart
  const void* weights;       // [T] float, double for f64
  double scale;
  bool normalize;
  int64_t num_tasks;    // T
  int64_t task_stride;  // in numbers
  DType base_dtype, task_dtype;
};

}  // namespace samerge
