#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

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
    default:
      TORCH_CHECK_TYPE(false, "samerge_ext computes in float32, bfloat16, float16 and float64, not ",
                       tensor.scalar_type());
  }
}

inline at::ScalarType accumulator(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor itself where its last dimension is dense, so that rows may lie apart, else a contiguous copy.
inline at::Tensor dense_rows(const at::Tensor& tensor) {
  return tensor.size(-1) == 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// Task vectors are numbers, or codes where there are scales.
inline DType task_dtype_of(const at::Tensor& task_vectors, const std::optional<at::Tensor>& scales) {
  if (!scales) return dtype_of(task_vectors);
  TORCH_CHECK_TYPE(task_vectors.scalar_type() == at::kChar || task_vectors.scalar_type() == at::kByte,
                   "codes of task vectors are int8 or, two to a byte, uint8, not ", task_vectors.scalar_type());
  return task_vectors.scalar_type() == at::kChar ? DType::i8 : DType::i4;
}

inline void check_packed(const at::Tensor& vector, const at::Tensor& task_vectors, const at::Tensor& block_layer,
                         const std::optional<at::Tensor>& scales,
                         at::DeviceType device) {  // [N], [T, N], [N / kBlock], [T, N / kGroup]
  const int64_t per_element = task_dtype_of(task_vectors, scales) == DType::i4 ? 2 : 1;
  TORCH_CHECK_VALUE(
      vector.dim() == 1 && task_vectors.dim() == 2 && per_element * task_vectors.size(1) == vector.size(0) &&
          block_layer.numel() * kBlock == vector.size(0) && block_layer.scalar_type() == at::kInt,
      "packed tensors do not fit: ", vector.sizes(), ", ", task_vectors.sizes(), ", ", block_layer.sizes());
  if (scales) {
    TORCH_CHECK_VALUE(scales->dim() == 2 && scales->size(0) == task_vectors.size(0) &&
                          scales->size(1) * kGroup == vector.size(0) && scales->scalar_type() == at::kBFloat16 &&
                          scales->device() == vector.device(),
                      "scales must be bfloat16, [T, N / ", kGroup, "], and lie beside the codes");
  } else {
    TORCH_CHECK_VALUE((vector.scalar_type() == at::kDouble) == (task_vectors.scalar_type() == at::kDouble),
                      "float64 does not mix with other dtypes");
  }
  TORCH_CHECK_VALUE(vector.device().type() == device && task_vectors.device() == vector.device() &&
                        block_layer.device() == vector.device(),
                    "this operator runs on tensors of one device, of type ", device);
}

// Tells a WeightedSum or CoefficientGrad of dense task vectors, which outlive the call, where they lie.
template <class Call>
void set_task_vectors(Call& a, const at::Tensor& task_vectors, const std::optional<at::Tensor>& scales) {
  a.task_vectors = task_vectors.const_data_ptr();
  a.num_tasks = task_vectors.size(0);
  a.task_stride = task_vectors.stride(0);
  a.task_dtype = task_dtype_of(task_vectors, scales);
  a.scales = scales ? static_cast<const uint16_t*>(scales->const_data_ptr()) : nullptr;
  a.scale_stride = scales ? scales->stride(0) : 0;
}

inline std::optional<at::Tensor> dense_rows(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(dense_rows(*tensor)) : std::nullopt;
}

}  // namespace samerge
