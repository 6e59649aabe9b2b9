#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "levels.h"

namespace samerge {

constexpr int64_t kNumbersPerThread = 16384;  // fewer do not pay for a thread

static RowLoss row_loss(const std::string& name) {
  if (name == "kl") return RowLoss::kl;
  if (name == "cross_entropy") return RowLoss::cross_entropy;
  TORCH_CHECK_VALUE(name == "entropy", "unknown loss '", name, "'; choose kl, cross_entropy or entropy");
  return RowLoss::entropy;
}

std::tuple<at::Tensor, std::optional<at::Tensor>> softmax_kl_cpu(
    const at::Tensor& student,                         // [R, V]
    const std::optional<at::Tensor>& teacher,          // [K, R, V]
    const std::optional<at::Tensor>& teacher_weights,  // [K, R]
    const std::optional<at::Tensor>& num_classes,      // [R]
    const std::optional<at::Tensor>& row_scale,        // [R]
    const std::string& loss, double student_temperature,
    double teacher_temperature) {  // -> [R], [R, V]
  TORCH_CHECK_VALUE(student.dim() == 2 && student.size(1) > 0 && student.device().is_cpu(),
                    "student must be [R, V] on the CPU with at least one class, not ", student.sizes());
  const int64_t rows = student.size(0), columns = student.size(1);
  const auto real = accumulator(student);

  SoftmaxKl a{};
  a.loss = row_loss(loss);
  TORCH_CHECK_VALUE(teacher.has_value() == (a.loss != RowLoss::entropy), loss, teacher ? " takes no teacher" : " needs a teacher");
  a.num_rows = rows;
  a.num_columns = columns;
  a.student_dtype = dtype_of(student);
  a.student_temperature = student_temperature;
  a.teacher_temperature = teacher_temperature;
  const auto dense_student = dense_rows(student);
  a.student = dense_student.const_data_ptr();
  a.student_stride = dense_student.stride(0);

  at::Tensor dense_teacher, weights, classes, scale;
  if (teacher) {
    TORCH_CHECK_VALUE(teacher->dim() == 3 && teacher->size(0) > 0 && teacher->size(1) == rows && teacher->size(2) == columns &&
                          teacher->device().is_cpu() && accumulator(*teacher) == real,
                      "teacher must be [K, R, V] on the CPU, and float64 only where student is");
    dense_teacher = dense_rows(*teacher);
    a.num_teachers = teacher->size(0);
    a.teacher = dense_teacher.const_data_ptr();
    a.teacher_dtype = dtype_of(*teacher);
    a.teacher_stride = dense_teacher.stride(0);
    a.teacher_row_stride = dense_teacher.stride(1);
  }
  if (teacher_weights) {
    TORCH_CHECK_VALUE(teacher_weights->dim() == 2 && teacher_weights->size(0) == a.num_teachers &&
                          teacher_weights->size(1) == rows && teacher_weights->scalar_type() == real,
                      "teacher_weights must be [K, R] of the accumulation dtype");
    weights = teacher_weights->contiguous();
    a.teacher_weights = weights.const_data_ptr();
  }
  if (num_classes) {
    TORCH_CHECK_VALUE(num_classes->numel() == rows, "num_classes must be [R]");
    classes = num_classes->contiguous();
    a.num_classes = classes.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < rows; ++r)
      TORCH_CHECK_VALUE(a.num_classes[r] >= 1 && a.num_classes[r] <= columns, "num_classes[", r, "] is ", a.num_classes[r],
                        "; num_classes must lie in 1 ... ", columns, ", the number of columns of student");
  }
  const auto losses = at::empty({rows}, student.options().dtype(real));
  a.losses = losses.mutable_data_ptr();
  std::optional<at::Tensor> grad;
  if (row_scale) {
    TORCH_CHECK_VALUE(row_scale->numel() == rows && row_scale->scalar_type() == real,
                      "row_scale must be [R] of the accumulation dtype");
    scale = row_scale->contiguous();
    grad = at::empty({rows, columns}, student.options());
    a.row_scale = scale.const_data_ptr();
    a.grad = grad->mutable_data_ptr();
  }
  const auto loop = loops().softmax_kl;
  at::parallel_for(0, rows, std::max<int64_t>(1, kNumbersPerThread / columns),
                   [&](int64_t first, int64_t last) { loop(a, first, last); });
  return {losses, grad};
}

}  // namespace samerge
