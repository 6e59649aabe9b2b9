#include "../magnitudes_call.h"
#include "levels.h"
#include "parallel.h"

namespace samerge {

void count_digits_cpu(const at::Tensor& counts, const at::Tensor& numbers, const at::Tensor& keys,
                      const at::Tensor& ties, int64_t shift) {  // [T, kDigits], [T, n], [T], [T]
  check_counts(counts, keys, ties, at::kCPU);
  const Magnitudes a = magnitudes_call(numbers, keys, ties, at::kCPU);
  const bool first = shift == 8 * a.bytes - 16;
  const auto loop = loops().count_digits;
  auto* const all = counts.mutable_data_ptr<int64_t>();
  share_out(a.num_rows, least_rows(a.count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (a.ties[t] > 0)
        loop(static_cast<const char*>(a.numbers) + t * a.stride * a.bytes, a.count, a.bytes, int(shift),
             first ? -1 : a.keys[t], all + t * kDigits);
  });
}

void next_digit_cpu(const at::Tensor& counts, const at::Tensor& keys, const at::Tensor& ties, int64_t infinity,
                    bool last) {  // [T, kDigits], [T], [T]
  check_counts(counts, keys, ties, at::kCPU);
  auto* count = counts.mutable_data_ptr<int64_t>();
  auto *key = keys.mutable_data_ptr<int64_t>(), *left = ties.mutable_data_ptr<int64_t>();
  for (const auto* end = key + keys.numel(); key < end; ++key, ++left, count += kDigits) {
    if (*left <= 0) continue;
    bool finite = true;
    for (int64_t digit = infinity; digit < kDigits; ++digit) finite &= count[digit] == 0;
    int64_t digit = kDigits - 1;
    while (digit >= 0 && count[digit] < *left) *left -= count[digit--];
    *key = !finite ? -1 : digit < 0 ? 0 : *key << 16 | digit;
    if (*key < 0 || digit < 0 || (last && (*key == 0 || *left == count[digit]))) *left = -1;
    std::fill(count, count + kDigits, 0);
  }
}

void trim_cpu(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys,
              const at::Tensor& ties) {  // [T, n], [T, n], [T], [T]
  const Magnitudes a = magnitudes_call(numbers, keys, ties, at::kCPU);
  check_out(out, numbers);
  const auto loop = loops().trim;
  auto* const trimmed = static_cast<char*>(out.mutable_data_ptr());
  share_out(a.num_rows, least_rows(a.count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      a.ties[t] =
          loop(trimmed + t * out.stride(0) * a.bytes, static_cast<const char*>(a.numbers) + t * a.stride * a.bytes,
               a.count, a.bytes, uint64_t(a.keys[t]), a.ties[t]);
  });
}

}  // namespace samerge
