#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "tensors.h"

namespace samerge {

// Addresses of matrices of one shape, dtype and stride, for a kernel that reads them where they lie.
inline std::vector<const void*> addresses(const std::vector<at::Tensor>& matrices, at::DeviceType device) {
  std::vector<const void*> pointers;
  for (const auto& matrix : matrices) {
    const auto& first = matrices[0];
    TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.sizes() == first.sizes() && matrix.strides() == first.strides() &&
                          matrix.stride(1) == 1 && matrix.scalar_type() == first.scalar_type() &&
                          matrix.device() == first.device() && matrix.device().type() == device,
                      "matrices must be of one shape, dtype and stride, with dense rows, on one device of type ",
                      device);
    pointers.push_back(matrix.const_data_ptr());
  }
  return pointers;
}

inline void check_bases(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases) {
  TORCH_CHECK_VALUE(!matrices.empty() &&
                        (bases.empty() || (bases.size() == matrices.size() && bases[0].sizes() == matrices[0].sizes())),
                    "bases must be none, or one for every matrix and of its shape");
}

}  // namespace samerge
