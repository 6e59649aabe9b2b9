#pragma once

#include "../tensors.h"

namespace samerge {

inline void check_block_layer(const at::Tensor& block_layer, int64_t num_layers) {  // [N / kBlock], contiguous
  const auto* layer = block_layer.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < block_layer.numel(); ++b)
    TORCH_CHECK_VALUE(layer[b] >= (b ? layer[b - 1] : 0) && layer[b] < num_layers, "block_layer[", b, "] is ", layer[b],
                      "; it must be non-decreasing and lie in 0 ... ", num_layers - 1);
}

}  // namespace samerge
