#pragma once

#include "elected_sum.h"
#include "tensors.h"

namespace samerge {

inline void check_elected_sum(const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& weights,
                              at::DeviceType device) {  // [N], [T, N], [T]
  TORCH_CHECK_VALUE(
      base.dim() == 1 && base.size(0) % kBlock == 0 && task_vectors.dim() == 2 &&
          task_vectors.size(1) == base.size(0) && weights.dim() == 1 && weights.size(0) == task_vectors.size(0) &&
          weights.scalar_type() == accumulator(base) && accumulator(task_vectors) == accumulator(base),
      "elected_sum's arguments do not fit: ", base.sizes(), ", ", task_vectors.sizes(), ", ", weights.sizes());
  TORCH_CHECK_VALUE(
      base.device().type() == device && task_vectors.device() == base.device() && weights.device() == base.device(),
      "this operator runs on tensors of one device of type ", device);
}

// Weights as the task vectors' dtype holds them.
inline at::Tensor rounded_weights(const at::Tensor& weights, const at::Tensor& task_vectors) {  // [T]
  return weights.to(task_vectors.scalar_type()).to(weights.scalar_type()).contiguous();
}

// The arguments of loops and kernels, from dense tensors that outlive the call; rows of task_vectors may lie apart.
inline ElectedSum elected_sum_call(const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors,
                                   const at::Tensor& weights, double scale, bool normalize) {
  ElectedSum a;
  a.out = out.mutable_data_ptr();
  a.base = base.const_data_ptr();
  a.task_vectors = task_vectors.const_data_ptr();
  a.weights = weights.const_data_ptr();
  a.scale = scale;
  a.normalize = normalize;
  a.num_tasks = task_vectors.size(0);
  a.task_stride = task_vectors.stride(0);
  a.base_dtype = dtype_of(base);
  a.task_dtype = dtype_of(task_vectors);
  return a;
}

}  // namespace samerge
