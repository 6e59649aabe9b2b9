#include <ATen/Parallel.h>

#include <algorithm>
#include <tuple>

#include "../softmax_kl_call.h"
#include "levels.h"

namespace samerge {

constexpr int64_t kNumbersPerThread = 16384;  // fewer do not pay for a thread

std::tuple<at::Tensor, std::optional<at::Tensor>> softmax_kl_cpu(
    const at::Tensor& student,                         // [R, V]
    const std::optional<at::Tensor>& teacher,          // [K, R, V]
    const std::optional<at::Tensor>& teacher_weights,  // [K, R]
    const std::optional<at::Tensor>& num_classes,      // [R]
    const std::optional<at::Tensor>& row_scale,        // [R]
    const std::string& loss, double student_temperature,
    double teacher_temperature) {  // -> [R], [R, V]
  const SoftmaxKlCall call(at::kCPU, student, teacher, teacher_weights, num_classes, row_scale, loss, student_temperature,
                           teacher_temperature);
  const SoftmaxKl& a = call.arguments;
  for (int64_t r = 0; a.num_classes && r < a.num_rows; ++r)
    TORCH_CHECK_VALUE(a.num_classes[r] >= 1 && a.num_classes[r] <= a.num_columns, "num_classes[", r, "] is ", a.num_classes[r],
                      "; num_classes must lie in 1 ... ", a.num_columns, ", the number of columns of student");
  const auto loop = loops().softmax_kl;
  at::parallel_for(0, a.num_rows, std::max<int64_t>(1, kNumbersPerThread / a.num_columns),
                   [&](int64_t first, int64_t last) { loop(a, first, last); });
  return {call.losses, call.grad};
}

}  // namespace samerge
