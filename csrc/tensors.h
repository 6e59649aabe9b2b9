#pragma once

#include <ATen/core/Tensor.h>

#include "dtype.h"

// What the tensor wrappers share. Shapes and dtypes that a caller can get wrong are checked in samerge_ext/ops with
// messages meant to be read; the checks here keep the loops and kernels inside their memory.

namespace samerge {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kDouble: return DType::f64;
    default: TORCH_CHECK_TYPE(false, "samerge_ext computes in float32, bfloat16, float16 and float64, not ", tensor.scalar_type());
  }
}

inline at::ScalarType accumulator(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor itself where its last dimension is dense, so that rows may lie apart, else a contiguous copy.
inline at::Tensor dense_rows(const at::Tensor& tensor) {
  return tensor.size(-1) == 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

inline void check_packed(const at::Tensor& vector, const at::Tensor& task_vectors, const at::Tensor& block_layer,
                         at::DeviceType device) {  // [N], [T, N], [N / kBlock]
  TORCH_CHECK_VALUE(vector.dim() == 1 && task_vectors.dim() == 2 && task_vectors.size(1) == vector.size(0) &&
                        block_layer.numel() * kBlock == vector.size(0) && block_layer.scalar_type() == at::kInt,
                    "packed tensors do not fit: ", vector.sizes(), ", ", task_vectors.sizes(), ", ", block_layer.sizes());
  TORCH_CHECK_VALUE((vector.scalar_type() == at::kDouble) == (task_vectors.scalar_type() == at::kDouble),
                    "float64 does not mix with other dtypes");
  TORCH_CHECK_VALUE(vector.device().type() == device && task_vectors.device() == vector.device() &&
                        block_layer.device() == vector.device(),
                    "this operator runs on tensors of one device, of type ", device);
}

}  // namespace samerge
