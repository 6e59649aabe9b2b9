// One row at a time, in chunks that stay in the first-level cache. A first pass finds each row's largest logit m and
// Z = sum of exp((x - m) / temperature), rescaled when a chunk brings a larger m, and keeps the exponentials where there is room
// for them; a second pass over the same row computes loss and gradient, and two where a gradient needs a sum over the row first. A
// row of one chunk is read once.
#pragma once

#include "softmax_kl_divergence_loops.h"
#include "softmax_kl_row.h"

namespace samerge::SAMERGE_LEVEL {

enum class Slope { set, add, stream };  // what becomes of those that are computed

// The slopes weight * (q - p) over a chunk are set, stored past the caches, or added to those of teachers before; returns the
// chunk's part of KL(p || q).
template <class Vector, bool kSameTemperature, Slope kSlope, class Real = lane_t<Vector>>
double kl_chunk(const TwoChunks<Vector>& two, Real weight, Chunk<Vector> slope, int64_t ahead) {
  const LogRatio<Vector, kSameTemperature> log_ratio(two.teacher, two.student, two.offset);
  const ConstChunk<Vector> t = two.t, s = two.s;
  const Exponentials<Real> p = two.p, q = two.q;
  // KL is homogeneous in p and q, so both are computed in units of p's factor, which may not be too small to divide by.
  const Real unit = p.factor > Real(1e-30) ? p.factor : Real(1e-30), ratio = q.factor / unit,
             slope_weight = weight * unit;
  Vector total = {};
  for_vectors<Vector>(two.n, [=, &total](int64_t i, bool last) SAMERGE_INLINE_BODY {
    const Vector d = log_ratio(load<Vector>(t.vector(i, last)), load<Vector>(s.vector(i, last)));
    const KlTerm<Vector> term =
        kl_term<Real>(load<Vector>(p.values + i), load<Vector>(q.values + i) * ratio, d, exp_remainder(d));
    total += term.loss;
    Real* place = slope.vector(i, last);
    const Vector change = term.slope * slope_weight;
    if (kSlope == Slope::stream && !last) {
      stream(place, change);
    } else {
      __builtin_prefetch(place + ahead, 1);
      store(place, kSlope == Slope::add ? load<Vector>(place) + change : change);
    }
  });
  return sum(total) * unit;
}

// slope = weight * d H(q) / d (x / temperature) = -weight * q * (log q + H) over a chunk.
template <class Vector, class Real = lane_t<Vector>>
void entropy_chunk(const Row<Vector>& row, ConstChunk<Vector> x, Exponentials<Real> q, int64_t n, Real weight,
                   Chunk<Vector> slope) {
  const Real shift = row.entropy - row.log_sum, factor = -weight * q.factor;
  const Real max = row.max, inverse = row.inverse_temperature;
  for_vectors<Vector>(n, [=](int64_t i, bool last) SAMERGE_INLINE_BODY {
    const Vector e = load<Vector>(q.values + i), y = (load<Vector>(x.vector(i, last)) - max) * inverse;
    store(slope.vector(i, last), e == Real(0) ? Vector{} : e * factor * (y + shift));
  });
}

template <class Vector, class Real = lane_t<Vector>>
struct Teacher {
  Row<Vector> row;
  Real weight;
  Real offset;     // of divergences: log Z - log Z of the student
  int64_t target;  // cross_entropy
};

template <class Vector, class Real = lane_t<Vector>>
void row_losses(const SoftmaxKl& a, const RowFunctions<Vector>& students, const RowFunctions<Vector>& teachers,
                int64_t first, int64_t last, void* scratch, bool streamed) {
  const Real inverse_student = 1 / a.student_temperature, inverse_teacher = 1 / a.teacher_temperature;
  // Not a page apart: a load waits for a store to the same place in another page.
  alignas(64) Real student_buffer[kChunk + 48], teacher_buffer[kChunk + 48], p_buffer[kChunk + 48],
      q_buffer[kChunk + 48], slope_buffer[kChunk];
  auto* teacher = static_cast<Teacher<Vector>*>(__builtin_alloca(a.num_teachers * sizeof(Teacher<Vector>)));  // [K]
  const bool same = inverse_student == inverse_teacher, is_alone = a.num_teachers == 1;
  const bool overwritten = a.grad == a.student && students.wide && a.num_teachers > 1;
  const auto set_kl = same ? kl_chunk<Vector, true, Slope::set> : kl_chunk<Vector, false, Slope::set>;
  const auto add_kl = same ? kl_chunk<Vector, true, Slope::add> : kl_chunk<Vector, false, Slope::add>;
  const auto stream_kl = same ? kl_chunk<Vector, true, Slope::stream> : kl_chunk<Vector, false, Slope::stream>;
  const bool divergence = is_divergence(a.loss), centred = is_centred(a.loss);
  const DivergenceLoops<Vector> of_divergence = divergence_loops<Vector>(a.loss == RowLoss::jsd, same);
  const Real beta = a.beta, rest = 1 - a.beta;
  const auto first_kl = streamed && students.wide && is_alone ? stream_kl : set_kl;
  const auto write = streamed ? students.stream : students.write;
  const int64_t chunks = (a.num_columns + kChunk - 1) / kChunk;
  // Short rows follow each other sooner than the processor's own prefetching notices.
  const bool is_short = chunks == 1;
  const int64_t grad_ahead = is_short ? a.num_columns : kChunk;
  auto* room = static_cast<Real*>(scratch);
  auto* maxima = room ? room + (1 + a.num_teachers) * chunks * kChunk : nullptr;
  Row<Vector> student;
  // The student is row 0, teacher k row 1 + k.
  for (int64_t k = 0; k <= a.num_teachers; ++k) {
    Row<Vector>& row = k ? teacher[k - 1].row : student;
    row.storage = k ? teachers : students;
    row.buffer = k ? teacher_buffer : student_buffer;
    row.ahead = row.storage.bytes * (!is_short ? kChunk : k ? a.teacher_row_stride : a.student_stride);
    row.inverse_temperature = k ? inverse_teacher : inverse_student;
    row.exponentials = room ? room + k * chunks * kChunk : nullptr;
    row.maxima = room ? maxima + k * chunks : nullptr;
  }

  for (int64_t r = first; r < last; ++r) {
    const int64_t n = a.num_classes ? a.num_classes[r] : a.num_columns;
    student.set(static_cast<const char*>(a.student) + r * a.student_stride * students.bytes, n, true);
    normalize(student, !divergence, a.loss == RowLoss::entropy);
    double loss = a.loss == RowLoss::entropy ? student.entropy : 0;
    Real total_weight = 0;

    for (int64_t k = 0; k < a.num_teachers; ++k) {
      Teacher<Vector>& t = teacher[k];
      const int64_t offset = k * a.teacher_stride + r * a.teacher_row_stride;
      t.row.set(static_cast<const char*>(a.teacher) + offset * teachers.bytes, n, is_alone);
      t.weight = a.teacher_weights ? static_cast<const Real*>(a.teacher_weights)[k * a.num_rows + r]
                                   : Real(1) / Real(a.num_teachers);
      total_weight += t.weight;
      if (divergence) {
        normalize(t.row, false, false);
        t.offset = __builtin_log(t.row.sum / student.sum);
      } else {
        t.target = argmax(t.row);
        loss += t.weight * (student.log_sum - (double(student.number(t.target)) - student.max) * inverse_student);
      }
    }

    // Calls body(k, two) for every teacher's share of a chunk.
    const auto for_teachers = [&](int64_t begin, int64_t count, const ConstChunk<Vector>& x,
                                  const Exponentials<Real>& q, const auto& body) {
      for (int64_t k = 0; k < a.num_teachers; ++k) {
        const Teacher<Vector>& t = teacher[k];
        const ConstChunk<Vector> numbers = t.row.chunk(begin, count);
        const Exponentials<Real> p = exponentials(t.row, begin, count, numbers, p_buffer);
        body(k, TwoChunks<Vector>{t.row, student, numbers, x, p, q, t.offset, count});
      }
    };
    double mean = 0;
    if (centred)
      for_chunks(student, [&](int64_t begin, int64_t count, const ConstChunk<Vector>& x) {
        const Exponentials<Real> q = exponentials(student, begin, count, x, q_buffer);
        for_teachers(begin, count, x, q, [&](int64_t k, const TwoChunks<Vector>& two) {
          const DivergenceSums sums = of_divergence.sums(two, beta, rest);
          loss += teacher[k].weight * sums.loss;
          mean += teacher[k].weight * sums.mean;
        });
      });

    char* grad = a.grad ? static_cast<char*>(a.grad) + r * a.num_columns * students.bytes : nullptr;
    const Real grad_scale = grad ? static_cast<const Real*>(a.row_scale)[r] * inverse_student : Real(0);
    if (grad || a.loss == RowLoss::kl) {
      for_chunks(student, [&](int64_t begin, int64_t count, ConstChunk<Vector> x) {
        if (overwritten) {  // by the first teacher's slopes, when the next teacher still needs it
          __builtin_memcpy(student_buffer, x.values, x.whole * sizeof(Real));
          x.values = student_buffer;
        }
        const Exponentials<Real> q = exponentials(student, begin, count, x, q_buffer);
        char* target = grad ? grad + begin * students.bytes : nullptr;
        const bool in_place = target && students.wide;
        const Chunk<Vector> slope(in_place ? reinterpret_cast<Real*>(target) : slope_buffer, slope_buffer, count);
        if (a.loss == RowLoss::entropy) {
          entropy_chunk(student, x, q, count, grad_scale, slope);
        } else if (a.loss == RowLoss::kl) {
          for_teachers(begin, count, x, q, [&](int64_t k, const TwoChunks<Vector>& two) {
            const Real weight = teacher[k].weight;
            loss += weight * (k ? add_kl : first_kl)(two, weight * grad_scale, slope, grad_ahead);
          });
        } else if (centred) {
          for_teachers(begin, count, x, q, [&](int64_t k, const TwoChunks<Vector>& two) {
            of_divergence.slopes(two, beta, rest, teacher[k].weight, k > 0, slope);
          });
          center_slopes(q, count, Real(mean), grad_scale, slope);
        } else {
          const Real factor = total_weight * grad_scale * q.factor;
          for_vectors<Vector>(count, [=](int64_t i, bool last) SAMERGE_INLINE_BODY {
            store(slope.vector(i, last), load<Vector>(q.values + i) * factor);
          });
          for (int64_t k = 0; k < a.num_teachers; ++k) {
            const int64_t hit = teacher[k].target - begin;
            if (hit >= 0 && hit < count) *slope.at(hit) -= teacher[k].weight * grad_scale;
          }
        }
        if (grad) write(slope, target, count, grad_ahead);
      });
    }
    if (grad && n < a.num_columns) __builtin_memset(grad + n * students.bytes, 0, (a.num_columns - n) * students.bytes);
    static_cast<Real*>(a.losses)[r] = loss;
  }
}

void softmax_kl(const SoftmaxKl& a, int64_t first, int64_t last, void* scratch, bool streamed) {
  if (a.student_dtype == DType::f64) {
    row_losses<Double>(a, row_functions<F64>, row_functions<F64>, first, last, scratch, streamed);
  } else {
    constexpr RowFunctions<Float> of[] = {row_functions<F32>, row_functions<BF16>, row_functions<F16>};
    row_losses<Float>(a, of[int(a.student_dtype)], of[int(a.teacher_dtype)], first, last, scratch, streamed);
  }
  if (streamed) fence();
}

}  // namespace samerge::SAMERGE_LEVEL
