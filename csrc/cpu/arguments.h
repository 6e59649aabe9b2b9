#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../tensors.h"

namespace samerge {

inline void check_block_layer(const at::Tensor& block_layer, int64_t num_layers) {  // [N / kBlock], contiguous
  const auto* layer = block_layer.const_data_ptr<int32_t>();
  const int64_t blocks = block_layer.numel();
  const auto fits = [&](int64_t b) { return layer[b] >= (b ? layer[b - 1] : 0) && layer[b] < num_layers; };
  bool all = blocks == 0 || (fits(0) && layer[blocks - 1] < num_layers);
  for (int64_t b = 1; b < blocks; ++b) all &= layer[b] >= layer[b - 1];  // without a branch: many at once
  for (int64_t b = 0; !all && b < blocks; ++b)
    TORCH_CHECK_VALUE(fits(b), "block_layer[", b, "] is ", layer[b], "; it must be non-decreasing and lie in 0 ... ",
                      num_layers - 1);
}

// Whether writing past the caches pays and is possible: a result this large is not found in them again.
inline bool is_streamed(const at::Tensor& out) {  // contiguous; its rows must be aligned to 64 bytes
  constexpr size_t kLarge = size_t(32) << 20;
  const auto row_bytes = out.dim() > 1 ? out.size(-1) * out.itemsize() : 0;
  return out.nbytes() >= kLarge && (reinterpret_cast<uintptr_t>(out.const_data_ptr()) | row_bytes) % 64 == 0;
}

// Asks for large pages under a new large tensor: its first touch then costs a fault per 2 MiB instead of one per 4 KiB.
inline void use_huge_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kLarge = 8 << 20;  // bytes; the allocator reuses what is smaller
  if (tensor.nbytes() < kLarge) return;
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()) + tensor.nbytes()) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: nothing is lost where it is refused
#endif
}

}  // namespace samerge
