#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "softmax_kl.h"
#include "tensors.h"

namespace samerge {

inline RowLoss row_loss(const std::string& name, double beta) {
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta is ", beta, "; it must lie in 0 ... 1");
  if (name == "kl") return beta == 0 ? RowLoss::kl : beta == 1 ? RowLoss::reverse_kl : RowLoss::jsd;
  if (name == "cross_entropy") return RowLoss::cross_entropy;
  TORCH_CHECK_VALUE(name == "entropy", "unknown loss '", name, "'; choose kl, cross_entropy or entropy");
  return RowLoss::entropy;
}

// The arguments of a call, checked, as the loops and kernels take them, and the tensors that hold them and the results.
struct SoftmaxKlCall {
  SoftmaxKl arguments{};
  at::Tensor student, teacher, teacher_weights, num_classes, row_scale;
  at::Tensor losses;               // [R]
  std::optional<at::Tensor> grad;  // [R, V]

  SoftmaxKlCall(at::DeviceType device,
                const at::Tensor& given_student,                         // [R, V]
                const std::optional<at::Tensor>& given_teacher,          // [K, R, V]
                const std::optional<at::Tensor>& given_teacher_weights,  // [K, R]
                const std::optional<at::Tensor>& given_num_classes,      // [R]
                const std::optional<at::Tensor>& given_row_scale,        // [R]
                const std::optional<at::Tensor>& out,                    // [R, V]
                const std::string& loss, double student_temperature, double teacher_temperature, double beta) {
    SoftmaxKl& a = arguments;
    TORCH_CHECK_VALUE(given_student.dim() == 2 && given_student.size(1) > 0 && given_student.device().type() == device,
                      "student must be [R, V] on ", device, " with at least one class, not ", given_student.sizes());
    const int64_t rows = given_student.size(0), columns = given_student.size(1);
    const auto real = accumulator(given_student);
    const auto here = [&](const at::Tensor& tensor) { return tensor.device() == given_student.device(); };

    a.loss = row_loss(loss, beta);
    TORCH_CHECK_VALUE(given_teacher.has_value() == (a.loss != RowLoss::entropy), loss,
                      given_teacher ? " takes no teacher" : " needs a teacher");
    a.num_rows = rows;
    a.num_columns = columns;
    a.student_dtype = dtype_of(given_student);
    a.student_temperature = student_temperature;
    a.teacher_temperature = teacher_temperature;
    a.beta = beta;
    student = dense_rows(given_student);
    a.student = student.const_data_ptr();
    a.student_stride = student.stride(0);
    if (given_teacher) {
      TORCH_CHECK_VALUE(given_teacher->dim() == 3 && given_teacher->size(0) > 0 && given_teacher->size(1) == rows &&
                            given_teacher->size(2) == columns && here(*given_teacher) &&
                            accumulator(*given_teacher) == real,
                        "teacher must be [K, R, V] on the student's device, and float64 only where student is");
      teacher = dense_rows(*given_teacher);
      a.num_teachers = teacher.size(0);
      a.teacher = teacher.const_data_ptr();
      a.teacher_dtype = dtype_of(teacher);
      a.teacher_stride = teacher.stride(0);
      a.teacher_row_stride = teacher.stride(1);
    }
    if (given_teacher_weights) {
      TORCH_CHECK_VALUE(given_teacher_weights->dim() == 2 && given_teacher_weights->size(0) == a.num_teachers &&
                            given_teacher_weights->size(1) == rows && given_teacher_weights->scalar_type() == real &&
                            here(*given_teacher_weights),
                        "teacher_weights must be [K, R] of the accumulation dtype");
      teacher_weights = given_teacher_weights->contiguous();
      a.teacher_weights = teacher_weights.const_data_ptr();
    }
    if (given_num_classes) {
      TORCH_CHECK_VALUE(given_num_classes->numel() == rows && given_num_classes->scalar_type() == at::kLong &&
                            here(*given_num_classes),
                        "num_classes must be [R] int64");
      num_classes = given_num_classes->contiguous();
      a.num_classes = num_classes.const_data_ptr<int64_t>();
    }
    losses = student.new_empty({rows}, student.options().dtype(real));
    a.losses = losses.mutable_data_ptr();
    if (given_row_scale) {
      TORCH_CHECK_VALUE(
          given_row_scale->numel() == rows && given_row_scale->scalar_type() == real && here(*given_row_scale),
          "row_scale must be [R] of the accumulation dtype");
      row_scale = given_row_scale->contiguous();
      TORCH_CHECK_VALUE(!out || (out->sizes() == given_student.sizes() && out->is_contiguous() && here(*out) &&
                                 out->scalar_type() == given_student.scalar_type()),
                        "out must be contiguous, of the student's shape and dtype, and on its device");
      grad = out ? *out : student.new_empty({rows, columns});
      a.row_scale = row_scale.const_data_ptr();
      a.grad = grad->mutable_data_ptr();
    }
  }
};

}  // namespace samerge
