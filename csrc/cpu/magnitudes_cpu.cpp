#include <ATen/core/Tensor.h>

#include "../tensors.h"
#include "levels.h"

namespace samerge {

void count_digits_cpu(const at::Tensor& counts, const at::Tensor& numbers, int64_t shift,
                      int64_t prefix) {  // [65536], [n]
  TORCH_CHECK_VALUE(
      counts.is_cpu() && counts.scalar_type() == at::kLong && counts.numel() == kDigits && counts.is_contiguous(),
      "counts must be int64 [", kDigits, "], contiguous");
  TORCH_CHECK_VALUE(numbers.is_cpu() && numbers.is_contiguous(), "numbers must be contiguous, on the CPU");
  dtype_of(numbers);
  loops().count_digits(numbers.const_data_ptr(), numbers.numel(), int(numbers.itemsize()), int(shift), prefix,
                       counts.mutable_data_ptr<int64_t>());
}

int64_t trim_cpu(const at::Tensor& numbers, int64_t key, int64_t ties) {  // [n]
  TORCH_CHECK_VALUE(numbers.is_cpu() && numbers.is_contiguous(), "numbers must be contiguous, on the CPU");
  dtype_of(numbers);
  return loops().trim(numbers.mutable_data_ptr(), numbers.numel(), int(numbers.itemsize()), uint64_t(key), ties);
}

}  // namespace samerge
