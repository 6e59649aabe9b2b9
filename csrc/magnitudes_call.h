#pragma once

#include "magnitudes.h"
#include "tensors.h"

namespace samerge {

inline void check_rows(const at::Tensor& rows, const at::Tensor& beside, const char* name) {  // [T, n], on one device
  TORCH_CHECK_VALUE(rows.dim() == 2 && (rows.size(1) <= 1 || rows.stride(1) == 1) && rows.device() == beside.device(),
                    name, " must be [T, n] with dense rows, on the device of the rest, not ", rows.sizes());
}

inline void check_of_rows(const at::Tensor& values, const at::Tensor& rows, const char* name) {  // [T] of [T, ...]
  TORCH_CHECK_VALUE(values.scalar_type() == at::kLong && values.is_contiguous() && values.dim() == 1 &&
                        values.size(0) == rows.size(0) && values.device() == rows.device(),
                    name, " must be int64 [", rows.size(0), "], contiguous, on the device of the rest");
}

inline void check_counts(const at::Tensor& counts, const at::Tensor& keys, const at::Tensor& ties,
                         at::DeviceType device) {  // [T, kDigits], [T], [T]
  TORCH_CHECK_VALUE(counts.device().type() == device && counts.scalar_type() == at::kLong && counts.dim() == 2 &&
                        counts.size(1) == kDigits && counts.is_contiguous(),
                    "counts must be int64 [T, ", kDigits, "], contiguous, on a device of type ", device);
  check_of_rows(keys, counts, "keys");
  check_of_rows(ties, counts, "ties");
}

inline void check_out(const at::Tensor& out, const at::Tensor& numbers) {  // [T, n], [T, n]
  check_rows(out, numbers, "out");
  TORCH_CHECK_VALUE(out.sizes() == numbers.sizes() && out.scalar_type() == numbers.scalar_type(),
                    "out must have the shape and dtype of the numbers, ", numbers.sizes(), ", not ", out.sizes());
}

// The arguments of loops and kernels, which the tensors outlive.
inline Magnitudes magnitudes_call(const at::Tensor& numbers, const at::Tensor& keys, const at::Tensor& ties,
                                  at::DeviceType device) {  // [T, n], [T], [T]
  TORCH_CHECK_VALUE(numbers.device().type() == device, "numbers must lie on a device of type ", device);
  check_rows(numbers, keys, "numbers");
  check_of_rows(keys, numbers, "keys");
  check_of_rows(ties, numbers, "ties");
  dtype_of(numbers);
  Magnitudes a;
  a.numbers = numbers.const_data_ptr();
  a.keys = keys.mutable_data_ptr<int64_t>();
  a.ties = ties.mutable_data_ptr<int64_t>();
  a.num_rows = numbers.size(0);
  a.count = numbers.size(1);
  a.stride = numbers.stride(0);
  a.bytes = int(numbers.itemsize());
  return a;
}

}  // namespace samerge
