#pragma once

#include "dtype.h"

namespace samerge {

enum class RowLoss : int { kl, cross_entropy, entropy, reverse_kl, jsd };

// Teachers are compared class by class, from their probabilities.
constexpr bool is_divergence(RowLoss loss) { return loss != RowLoss::cross_entropy && loss != RowLoss::entropy; }
// The gradient by x / temperature is q[i] * (f[i] - sum over j of q[j] * f[j]): a sum over the row comes before its first number.
constexpr bool is_centred(RowLoss loss) { return loss == RowLoss::reverse_kl || loss == RowLoss::jsd; }

// With p_k = softmax(teacher[k, r] / teacher_temperature) and q = softmax(student[r] / student_temperature):
//   kl             losses[r] = sum over k of v[k, r] * sum over i of p_k[i] * log(p_k[i] / q[i])
//   reverse_kl     losses[r] = sum over k of v[k, r] * sum over i of q[i] * log(q[i] / p_k[i])
//   jsd            losses[r] = sum over k of v[k, r] * sum over i of beta * p_k[i] * log(p_k[i] / m_k[i])
//                              + (1 - beta) * q[i] * log(q[i] / m_k[i]), m_k = beta * p_k + (1 - beta) * q
//   cross_entropy  losses[r] = sum over k of v[k, r] * -log q[argmax p_k]
//   entropy        losses[r] = sum over i of -q[i] * log q[i]
//   grad[r, i] = row_scale[r] * d losses[r] / d student[r, i]
// "real" is double where the student is f64, else float.
struct SoftmaxKl {
  RowLoss loss;
  int64_t num_teachers;         // K, 0 for entropy
  int64_t num_rows;             // R
  int64_t num_columns;          // V
  const void* student;          // [R, V], rows student_stride apart
  const void* teacher;          // [K, R, V], strides teacher_stride and teacher_row_stride
  const void* teacher_weights;  // [K, R] real v, null for 1 / K
  const int64_t* num_classes;   // [R], null for V: the first classes of a row count, the others get gradient 0
  const void* row_scale;        // [R] real, null for no gradient
  void* losses;                 // [R] real
  void* grad;  // [R, V] in the student's dtype, null for no gradient; except for cross_entropy it may be
               // the student itself
  int64_t student_stride, teacher_stride, teacher_row_stride;  // in numbers
  double student_temperature, teacher_temperature;
  double beta;  // of jsd
  DType student_dtype, teacher_dtype;
};

}  // namespace samerge
