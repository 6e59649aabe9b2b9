#include <algorithm>
#include <tuple>

#include "../softmax_kl_call.h"
#include "arguments.h"
#include "levels.h"
#include "parallel.h"

namespace samerge {

constexpr int64_t kLeastNumbers = 4096;  // fewer do not pay for a thread
constexpr int64_t kPieceNumbers = 1 << 17;
constexpr int64_t kLargestScratch = 1 << 19;  // numbers of a thread, which must stay in its second-level cache

std::tuple<at::Tensor, std::optional<at::Tensor>> softmax_kl_cpu(
    const at::Tensor& student,                         // [R, V]
    const std::optional<at::Tensor>& teacher,          // [K, R, V]
    const std::optional<at::Tensor>& teacher_weights,  // [K, R]
    const std::optional<at::Tensor>& num_classes,      // [R]
    const std::optional<at::Tensor>& row_scale,        // [R]
    const std::optional<at::Tensor>& out,              // [R, V]
    const std::string& loss, double student_temperature, double teacher_temperature,
    double beta) {  // -> [R], [R, V]
  const SoftmaxKlCall call(at::kCPU, student, teacher, teacher_weights, num_classes, row_scale, out, loss,
                           student_temperature, teacher_temperature, beta);
  const SoftmaxKl& a = call.arguments;
  if (call.grad && !out) use_huge_pages(*call.grad);
  for (int64_t r = 0; a.num_classes && r < a.num_rows; ++r)
    TORCH_CHECK_VALUE(a.num_classes[r] >= 1 && a.num_classes[r] <= a.num_columns, "num_classes[", r, "] is ",
                      a.num_classes[r], "; num_classes must lie in 1 ... ", a.num_columns,
                      ", the number of columns of student");
  const auto loop = loops().softmax_kl;
  const bool in_place = call.grad && a.grad == a.student;  // in the caches, which then are not gone past
  const bool streamed = call.grad && !in_place && is_streamed(*call.grad);
  const int64_t chunks = (a.num_columns + kSoftmaxKlChunk - 1) / kSoftmaxKlChunk;
  const int64_t numbers = (1 + a.num_teachers) * chunks * (kSoftmaxKlChunk + 1);
  const auto rows = [&](int64_t numbers) { return std::max<int64_t>(1, numbers / a.num_columns); };
  share_out(a.num_rows, rows(kLeastNumbers), rows(kPieceNumbers), [&](int64_t first, int64_t last) {
    at::Tensor scratch;
    if (numbers <= kLargestScratch) scratch = call.losses.new_empty({numbers});
    loop(a, first, last, scratch.defined() ? scratch.mutable_data_ptr() : nullptr, streamed);
  });
  return {call.losses, call.grad};
}

}  // namespace samerge
