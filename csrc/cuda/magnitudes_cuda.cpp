#include <ATen/ops/empty.h>

#include "../magnitudes_call.h"
#include "arguments.h"

namespace samerge {

void count_digits_cuda(const at::Tensor& counts, const at::Tensor& numbers, const at::Tensor& keys,
                       const at::Tensor& ties, int64_t shift) {  // [T, kDigits], [T, n], [T], [T]
  check_counts(counts, keys, ties, at::kCUDA);
  const Magnitudes a = magnitudes_call(numbers, keys, ties, at::kCUDA);
  const c10::cuda::CUDAGuard guard(numbers.device());
  if (numbers.numel() == 0) return;
  C10_CUDA_CHECK(
      gpu::count_digits(a, counts.mutable_data_ptr<int64_t>(), int(shift), c10::cuda::getCurrentCUDAStream()));
}

void next_digit_cuda(const at::Tensor& counts, const at::Tensor& keys, const at::Tensor& ties, int64_t infinity,
                     bool last) {  // [T, kDigits], [T], [T]
  check_counts(counts, keys, ties, at::kCUDA);
  const c10::cuda::CUDAGuard guard(counts.device());
  if (counts.numel() == 0) return;
  C10_CUDA_CHECK(gpu::next_digit(counts.mutable_data_ptr<int64_t>(), keys.mutable_data_ptr<int64_t>(),
                                 ties.mutable_data_ptr<int64_t>(), counts.size(0), int(infinity), last,
                                 c10::cuda::getCurrentCUDAStream()));
}

void trim_cuda(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys,
               const at::Tensor& ties) {  // [T, n], [T, n], [T], [T]
  const Magnitudes a = magnitudes_call(numbers, keys, ties, at::kCUDA);
  check_out(out, numbers);
  const c10::cuda::CUDAGuard guard(numbers.device());
  if (numbers.numel() == 0) return;
  const auto kept = at::empty({a.num_rows, gpu::trimmed_tiles(a.count, a.bytes)}, keys.options());
  C10_CUDA_CHECK(gpu::trim(a, out.mutable_data_ptr(), out.stride(0), kept.mutable_data_ptr<int64_t>(),
                           c10::cuda::getCurrentCUDAStream()));
}

}  // namespace samerge
