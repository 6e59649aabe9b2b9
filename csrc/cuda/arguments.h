#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../tensors.h"
#include "launchers.h"

namespace samerge {

inline bool on_16_bytes(const at::Tensor& tensor, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && stride * tensor.element_size() % 16 == 0;
}

// Contiguous and on 16 bytes, for vector accesses: the tensor itself, or a copy.
inline at::Tensor aligned(const at::Tensor& vector) {  // [N]
  const auto dense = vector.contiguous();
  return on_16_bytes(dense) ? dense : dense.clone();
}

// As `aligned` for every row; rows may lie apart.
inline at::Tensor aligned_rows(const at::Tensor& matrix) {  // [T, N]
  const auto dense = dense_rows(matrix);
  return on_16_bytes(dense, dense.stride(0)) ? dense : dense.clone(at::MemoryFormat::Contiguous);
}

}  // namespace samerge
