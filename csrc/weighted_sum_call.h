#pragma once

#include "tensors.h"
#include "weighted_sum.h"

namespace samerge {

inline void check_weighted_sum(const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors,
                               const at::Tensor& coefficients, const at::Tensor& block_layer,
                               const std::optional<at::Tensor>& scales,
                               at::DeviceType device) {  // [N], [N], [T, N], [T, L], [N / kBlock], [T, N / kGroup]
  check_packed(base, task_vectors, block_layer, scales, device);
  TORCH_CHECK_VALUE(out.sizes() == base.sizes() && out.is_contiguous() && out.device() == base.device() &&
                        accumulator(out) == accumulator(base),
                    "out must be contiguous, of the base's shape, and float64 only where base is");
  TORCH_CHECK_VALUE(coefficients.dim() == 2 && coefficients.size(0) == task_vectors.size(0) &&
                        coefficients.scalar_type() == accumulator(base) && coefficients.device() == base.device(),
                    "coefficients must be [T, L] of the accumulation dtype");
}

// The arguments of loops and kernels, from dense tensors that outlive the call; rows of task_vectors may lie apart.
inline WeightedSum weighted_sum_call(const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors,
                                     const at::Tensor& coefficients, const at::Tensor& block_layer,
                                     const std::optional<at::Tensor>& scales) {
  WeightedSum a;
  a.out = out.mutable_data_ptr();
  a.base = base.const_data_ptr();
  set_task_vectors(a, task_vectors, scales);
  a.coefficients = coefficients.const_data_ptr();
  a.block_layer = block_layer.const_data_ptr<int32_t>();
  a.num_layers = coefficients.size(1);
  a.out_dtype = dtype_of(out);
  a.base_dtype = dtype_of(base);
  return a;
}

}  // namespace samerge
