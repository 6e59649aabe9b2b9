// One row at a time, in chunks that stay in the first-level cache as float (or double). A first pass finds each row's
// largest logit m and log Z, with Z = sum of exp((x - m) / temperature), rescaled when a chunk brings a larger m; a
// second pass over the same row computes loss and gradient. Chunks are padded with -inf to whole vectors.
#pragma once

#include "../softmax_kl.h"
#include "simd.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int64_t kChunk = 1024;

template <class Storage, class Real = lane_t<typename Storage::Vector>>
void read_padded(const void* source, int64_t n, Real* chunk) {  // [n], [n up to whole vectors]
  using Vector = typename Storage::Vector;
  constexpr int kStep = kLanes<Vector>;
  const auto* numbers = static_cast<const typename Storage::Stored*>(source);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store(chunk + i, Storage::read(numbers + i));
  if (i == n) return;
  typename Storage::Stored rest[kStep] = {};
  __builtin_memcpy(rest, numbers + i, (n - i) * sizeof(rest[0]));
  store(chunk + i, Storage::read(rest));
  for (int64_t k = n; k < i + kStep; ++k) chunk[k] = -__builtin_inff();
}

template <class Storage, class Real = lane_t<typename Storage::Vector>>
void write_some(void* target, int64_t begin, int64_t n, const Real* chunk) {
  using Vector = typename Storage::Vector;
  constexpr int kStep = kLanes<Vector>;
  auto* numbers = static_cast<typename Storage::Stored*>(target) + begin;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) Storage::write(numbers + i, load<Vector>(chunk + i));
  if (i == n) return;
  typename Storage::Stored rest[kStep];
  Storage::write(rest, load<Vector>(chunk + i));
  __builtin_memcpy(numbers + i, rest, (n - i) * sizeof(rest[0]));
}

template <class Real>
struct Row {
  const char* numbers;
  int64_t bytes;  // of a number
  void (*read)(const void* numbers, int64_t n, Real* chunk);

  void read_chunk(int64_t begin, int64_t n, Real* chunk) const { read(numbers + begin * bytes, n, chunk); }
};

// Calls chunk(begin, count, x) with the first n numbers of a row, kChunk of them at a time.
template <class Real, class Chunk>
SAMERGE_INLINE void for_chunks(const Row<Real>& row, int64_t n, Real* x, const Chunk& chunk) {
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t count = n - begin < kChunk ? n - begin : kChunk;
    row.read_chunk(begin, count, x);
    chunk(begin, count);
  }
}

template <class Vector, class Real = lane_t<Vector>>
Real chunk_max(const Real* x, int64_t n, Real at_least) {
  Vector largest = broadcast<Vector>(at_least);
  for (int64_t i = 0; i < n; i += kLanes<Vector>) largest = max(load<Vector>(x + i), largest);
  return max_lane(largest);
}

template <class Real>
struct Normalizer {
  Real max;        // m
  double log_sum;  // log Z
  double entropy;  // log Z - (sum of exp(y) * y) / Z with y = (x - m) / temperature: no term cancels another
};

template <class Vector, class Real = lane_t<Vector>>
Normalizer<Real> normalize(const Row<Real>& row, int64_t n, Real inverse_temperature, bool with_entropy) {
  alignas(64) Real x[kChunk];
  Partition<Real, double> seen = {-__builtin_inff(), 0, 0};
  for_chunks(row, n, x, [&](int64_t, int64_t count) {
    const Real larger = chunk_max<Vector>(x, count, seen.max);
    if (larger > seen.max) {
      const double shift = (double(seen.max) - larger) * inverse_temperature;
      seen = rescaled(seen, larger, shift, __builtin_exp(shift));
    }
    if (seen.max == -__builtin_inff()) return;  // all masked so far
    Vector sums = {}, weighted = {};
    for (int64_t i = 0; i < count; i += kLanes<Vector>) {
      const Vector y = (load<Vector>(x + i) - seen.max) * inverse_temperature, e = exp(y);
      sums += e;
      if (with_entropy) weighted += e == Real(0) ? Vector{} : e * y;
    }
    seen.sum += sum(sums);
    seen.weighted += sum(weighted);
  });
  const double log_sum = __builtin_log(seen.sum);
  return {seen.max, log_sum, log_sum - seen.weighted / seen.sum};
}

// The first position of the largest number.
template <class Vector, class Real = lane_t<Vector>>
int64_t argmax(const Row<Real>& row, int64_t n) {
  alignas(64) Real x[kChunk];
  Real best = -__builtin_inff();
  int64_t position = 0;
  for_chunks(row, n, x, [&](int64_t begin, int64_t count) {
    const Real larger = chunk_max<Vector>(x, count, best);
    if (!(larger > best)) return;
    best = larger;
    for (position = begin; x[position - begin] != best;) ++position;
  });
  return position;
}

// slope += weight * (q - p) over a chunk; returns the chunk's part of KL(p || q).
template <class Vector, class Real = lane_t<Vector>>
double kl_chunk(const Real* teacher, const Normalizer<Real>& of_teacher, Real inverse_teacher, const Real* student,
                const Normalizer<Real>& of_student, Real inverse_student, const Real* q, int64_t n, Real weight,
                Real* slope) {
  const Real offset = of_teacher.log_sum - of_student.log_sum, max_gap = of_teacher.max - of_student.max;
  const Real scale = __builtin_exp(-of_teacher.log_sum);
  const bool same_temperature = inverse_teacher == inverse_student;
  Vector total = {};
  for (int64_t i = 0; i < n; i += kLanes<Vector>) {
    const Vector t = load<Vector>(teacher + i), s = load<Vector>(student + i), q_i = load<Vector>(q + i);
    const Vector log_p = (t - of_teacher.max) * inverse_teacher, p = exp(log_p) * scale;
    // t - s is exact where they are close, which (t - max) - (s - max) is not.
    const Vector d = (same_temperature ? ((t - s) - max_gap) * inverse_teacher
                                       : log_p - (s - of_student.max) * inverse_student) -
                     offset;
    const KlTerm<Vector> term = kl_term<Real>(p, q_i, d, exp_remainder(d));
    total += term.loss;
    store(slope + i, load<Vector>(slope + i) + term.slope * weight);
  }
  return sum(total);
}

// slope = d H(q) / d (x / temperature) = -q * (log q + H) over a chunk.
template <class Vector, class Real = lane_t<Vector>>
void entropy_chunk(const Real* x, const Normalizer<Real>& of, Real inverse_temperature, const Real* q, int64_t n,
                   Real* slope) {
  const Real shift = of.entropy - of.log_sum;
  for (int64_t i = 0; i < n; i += kLanes<Vector>) {
    const Vector q_i = load<Vector>(q + i), y = (load<Vector>(x + i) - of.max) * inverse_temperature;
    store(slope + i, q_i == Real(0) ? Vector{} : -q_i * (y + shift));
  }
}

template <class Real>
struct RowFunctions {
  void (*read)(const void*, int64_t, Real*);
  void (*write)(void*, int64_t, int64_t, const Real*);
  int64_t bytes;  // of a number
};

template <class Storage, class Real>
constexpr RowFunctions<Real> row_functions = {read_padded<Storage>, write_some<Storage>,
                                              int64_t(sizeof(typename Storage::Stored))};

template <class Real>
struct Teacher {
  Row<Real> row;
  Real weight;
  Normalizer<Real> normalizer;  // kl
  int64_t target;               // cross_entropy
};

template <class Vector, class Real = lane_t<Vector>>
void row_losses(const SoftmaxKl& a, const RowFunctions<Real>& students, const RowFunctions<Real>& teachers, int64_t first,
                int64_t last) {
  const Real inverse_student = 1 / a.student_temperature, inverse_teacher = 1 / a.teacher_temperature;
  alignas(64) Real x[kChunk], y[kChunk], q[kChunk], slope[kChunk];
  auto* teacher = static_cast<Teacher<Real>*>(__builtin_alloca(a.num_teachers * sizeof(Teacher<Real>)));  // [K]

  for (int64_t r = first; r < last; ++r) {
    const int64_t n = a.num_classes ? a.num_classes[r] : a.num_columns;
    const Row<Real> student = {static_cast<const char*>(a.student) + r * a.student_stride * students.bytes, students.bytes,
                               students.read};
    const Normalizer<Real> of_student = normalize<Vector>(student, n, inverse_student, a.loss == RowLoss::entropy);
    double loss = a.loss == RowLoss::entropy ? of_student.entropy : 0;
    Real total_weight = 0;

    for (int64_t k = 0; k < a.num_teachers; ++k) {
      Teacher<Real>& t = teacher[k];
      const int64_t offset = k * a.teacher_stride + r * a.teacher_row_stride;
      t.row = {static_cast<const char*>(a.teacher) + offset * teachers.bytes, teachers.bytes, teachers.read};
      t.weight = a.teacher_weights ? static_cast<const Real*>(a.teacher_weights)[k * a.num_rows + r]
                                   : Real(1) / Real(a.num_teachers);
      total_weight += t.weight;
      if (a.loss == RowLoss::kl) {
        t.normalizer = normalize<Vector>(t.row, n, inverse_teacher, false);
      } else {
        t.target = argmax<Vector>(t.row, n);
        student.read_chunk(t.target, 1, x);
        loss += t.weight * (of_student.log_sum - (double(x[0]) - of_student.max) * inverse_student);
      }
    }

    char* grad = a.grad ? static_cast<char*>(a.grad) + r * a.num_columns * students.bytes : nullptr;
    const Real grad_scale = grad ? static_cast<const Real*>(a.row_scale)[r] * inverse_student : Real(0);
    const Real q_scale = __builtin_exp(-of_student.log_sum);
    if (grad || a.loss == RowLoss::kl) {
      for_chunks(student, n, x, [&](int64_t begin, int64_t count) {
        for (int64_t i = 0; i < count; i += kLanes<Vector>)
          store(q + i, exp((load<Vector>(x + i) - of_student.max) * inverse_student) * q_scale);
        if (a.loss == RowLoss::entropy) {
          entropy_chunk<Vector>(x, of_student, inverse_student, q, count, slope);
        } else if (a.loss == RowLoss::kl) {
          for (int64_t i = 0; i < count; i += kLanes<Vector>) store(slope + i, Vector{});
          for (int64_t k = 0; k < a.num_teachers; ++k) {
            const Teacher<Real>& t = teacher[k];
            t.row.read_chunk(begin, count, y);
            loss += t.weight * kl_chunk<Vector>(y, t.normalizer, inverse_teacher, x, of_student, inverse_student, q, count,
                                                t.weight, slope);
          }
        } else {
          for (int64_t i = 0; i < count; i += kLanes<Vector>) store(slope + i, load<Vector>(q + i) * total_weight);
          for (int64_t k = 0; k < a.num_teachers; ++k) {
            const int64_t target = teacher[k].target - begin;
            if (target >= 0 && target < count) slope[target] -= teacher[k].weight;
          }
        }
        if (!grad) return;
        for (int64_t i = 0; i < count; i += kLanes<Vector>) store(slope + i, load<Vector>(slope + i) * grad_scale);
        students.write(grad, begin, count, slope);
      });
    }
    if (grad) __builtin_memset(grad + n * students.bytes, 0, (a.num_columns - n) * students.bytes);
    static_cast<Real*>(a.losses)[r] = loss;
  }
}

void softmax_kl(const SoftmaxKl& a, int64_t first, int64_t last) {
  if (a.student_dtype == DType::f64)
    return row_losses<Double>(a, row_functions<F64, double>, row_functions<F64, double>, first, last);
  constexpr RowFunctions<float> of[] = {row_functions<F32, float>, row_functions<BF16, float>, row_functions<F16, float>};
  row_losses<Float>(a, of[int(a.student_dtype)], of[int(a.teacher_dtype)], first, last);
}

}  // namespace samerge::SAMERGE_LEVEL
