#pragma once

#include "drop.h"
#include "magnitudes_call.h"

namespace samerge {

// The arguments of loops and kernels, which the tensors outlive.
inline Drop drop_call(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys,
                      const at::Tensor& thresholds, const at::Tensor& factors,
                      at::DeviceType device) {  // [T, n], [T, n], [T, stretches], [T], [T]
  TORCH_CHECK_VALUE(numbers.device().type() == device, "numbers must lie on a device of type ", device);
  check_rows(numbers, thresholds, "numbers");
  check_out(out, numbers);
  check_of_rows(thresholds, numbers, "thresholds");
  const int64_t stretches = (numbers.size(1) + kStretch - 1) / kStretch;
  TORCH_CHECK_VALUE(keys.scalar_type() == at::kInt && keys.is_contiguous() && keys.dim() == 2 &&
                        keys.size(0) == numbers.size(0) && keys.size(1) == stretches &&
                        keys.device() == numbers.device(),
                    "keys must be int32 [", numbers.size(0), ", ", stretches, "], contiguous, not ", keys.sizes());
  TORCH_CHECK_VALUE(factors.scalar_type() == accumulator(numbers) && factors.is_contiguous() && factors.dim() == 1 &&
                        factors.size(0) == numbers.size(0) && factors.device() == numbers.device(),
                    "factors must be ", accumulator(numbers), " [", numbers.size(0), "], contiguous");
  Drop a;
  a.out = out.mutable_data_ptr();
  a.numbers = numbers.const_data_ptr();
  a.keys = keys.const_data_ptr<int32_t>();
  a.thresholds = thresholds.const_data_ptr<int64_t>();
  a.factors = factors.const_data_ptr();
  a.num_rows = numbers.size(0);
  a.count = numbers.size(1);
  a.out_stride = out.stride(0);
  a.stride = numbers.stride(0);
  a.dtype = dtype_of(numbers);
  return a;
}

}  // namespace samerge
