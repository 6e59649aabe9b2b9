// One row at a time, in chunks that stay in the first-level cache. A first pass finds each row's largest logit m and
// Z = sum of exp((x - m) / temperature), rescaled when a chunk brings a larger m, and keeps the exponentials where there is room
// for them; a second pass over the same row computes loss and gradient. A row of one chunk is read once.
#pragma once

#include "../softmax_kl.h"
#include "chunk.h"

namespace samerge::SAMERGE_LEVEL {

// A row of logits and what the first pass leaves of it, with y = (x - max) / temperature.
template <class Vector, class Real = lane_t<Vector>>
struct Row {
  RowFunctions<Vector> storage;
  const char* numbers;  // [n]
  int64_t n;
  const Real* held;  // the values of a row of one chunk, once that is read; else null
  Real* buffer;      // [kChunk] its other numbers
  int64_t ahead;     // from a number to the one that is fetched into the cache meanwhile, in bytes
  Real inverse_temperature;
  Real*
      exponentials;  // [n up to whole chunks] of each chunk relative to the maximum so far; null where there is no room
  Real* maxima;      // [chunks] those maxima
  Real max;
  double sum;      // Z
  Real scale;      // 1 / Z
  double log_sum;  // log Z: not for the teachers of KL
  double entropy;  // log Z - (sum of exp(y) * y) / Z: no term cancels another

  // Another row. One that is held has a buffer of its own.
  void set(const void* new_numbers, int64_t new_n, bool hold) {
    numbers = static_cast<const char*>(new_numbers);
    n = new_n;
    held = hold && n <= kChunk ? storage.read(numbers, n, buffer) : nullptr;
  }
  SAMERGE_INLINE ConstChunk<Vector> chunk(int64_t begin, int64_t count) const {
    return {held ? held : storage.read(numbers + begin * storage.bytes, count, buffer), buffer, count};
  }
  Real number(int64_t i) const { return held ? *chunk(0, n).at(i) : *chunk(i, 1).at(0); }
};

// Calls body(begin, count, x) with a row's numbers, kChunk of them at a time.
template <class Vector, class Body>
SAMERGE_INLINE void for_chunks(const Row<Vector>& row, const Body& body) {
  for (int64_t begin = 0; begin < row.n; begin += kChunk) {
    const int64_t count = row.n - begin < kChunk ? row.n - begin : kChunk;
    body(begin, count, row.chunk(begin, count));
  }
}

template <class Vector, class Real = lane_t<Vector>>
Real chunk_max(const ConstChunk<Vector>& x, int64_t n, Real at_least) {
  constexpr int kStep = kLanes<Vector>;
  Vector some[4];  // four chains, since a maximum takes four cycles
  for (Vector& each : some) each = broadcast<Vector>(at_least);
  int64_t i = 0;
  for (; i + 4 * kStep <= x.whole; i += 4 * kStep)
    for (int k = 0; k < 4; ++k) some[k] = max(load<Vector>(x.values + i + k * kStep), some[k]);
  for (; i < n; i += kStep) some[0] = max(load<Vector>(x.at(i)), some[0]);
  return max_lane(max(max(some[1], some[0]), max(some[3], some[2])));
}

// The first pass.
template <class Vector, class Real = lane_t<Vector>>
void normalize(Row<Vector>& row, bool with_log, bool with_entropy) {
  alignas(64) Real unused[kChunk];
  Partition<Real, double> seen = {-__builtin_inff(), 0, 0};
  for_chunks(row, [&](int64_t begin, int64_t count, const ConstChunk<Vector>& x) {
    const Real larger = chunk_max(x, count, seen.max);
    if (larger > seen.max) {
      const double shift = (double(seen.max) - larger) * row.inverse_temperature;
      seen = rescaled(seen, larger, shift, begin ? __builtin_exp(shift) : 0.0);
    }
    Real* exponentials = row.exponentials ? row.exponentials + begin : unused;
    if (row.exponentials) row.maxima[begin / kChunk] = seen.max;
    // Where all is masked so far, any finite number makes the exponentials 0.
    const Real max = seen.max == -__builtin_inff() ? Real(0) : seen.max;
    const Real inverse = row.inverse_temperature;
    const char* next = row.numbers + begin * row.storage.bytes + row.ahead;
    const int64_t bytes = row.storage.bytes;
    Vector sums = {}, weighted = {};
    for_vectors<Vector>(count, [=, &sums, &weighted](int64_t i, bool last) SAMERGE_INLINE_BODY {
      prefetch(next + i * bytes);
      const Vector y = load<Vector>(x.vector(i, last)) - max, e = exp_scaled(y, inverse);
      store(exponentials + i, e);
      sums += e;
      if (with_entropy) weighted += e == Real(0) ? Vector{} : e * (y * inverse);
    });
    seen.sum += sum(sums);
    if (with_entropy) seen.weighted += sum(weighted);
  });
  row.max = seen.max;
  row.sum = seen.sum;
  row.scale = 1 / seen.sum;
  if (with_log) row.log_sum = __builtin_log(seen.sum);
  if (with_entropy) row.entropy = row.log_sum - seen.weighted / seen.sum;
}

// A chunk's exponentials and the factor that makes probabilities of them.
template <class Real>
struct Exponentials {
  const Real* values;
  Real factor;
};

template <class Vector, class Real = lane_t<Vector>>
Exponentials<Real> exponentials(const Row<Vector>& row, int64_t begin, int64_t count, const ConstChunk<Vector>& x,
                                Real* buffer) {
  if (row.exponentials) {
    const Real max = row.maxima[begin / kChunk];
    const Real factor =
        max == row.max ? Real(1) : Real(__builtin_exp((double(max) - row.max) * row.inverse_temperature));
    return {row.exponentials + begin, factor * row.scale};
  }
  for (int64_t i = 0; i < count; i += kLanes<Vector>)
    store(buffer + i, exp_scaled(load<Vector>(x.at(i)) - row.max, row.inverse_temperature));
  return {buffer, row.scale};
}

// The first position of the largest number.
template <class Vector, class Real = lane_t<Vector>>
int64_t argmax(const Row<Vector>& row) {
  Real best = -__builtin_inff();
  int64_t position = 0;
  for_chunks(row, [&](int64_t begin, int64_t count, const ConstChunk<Vector>& x) {
    const Real larger = chunk_max(x, count, best);
    if (!(larger > best)) return;
    best = larger;
    for (position = begin; *x.at(position - begin) != best;) ++position;
  });
  return position;
}

enum class Slope { set, add, stream };  // what becomes of those that are computed

// With offset = log Z of the teacher - log Z of the student: the slopes weight * (q - p) over a chunk are set, stored past the
// caches, or added to those of teachers before; returns the chunk's part of KL(p || q).
template <class Vector, bool kSameTemperature, Slope kSlope, class Real = lane_t<Vector>>
double kl_chunk(const Row<Vector>& teacher, ConstChunk<Vector> t, Exponentials<Real> p, const Row<Vector>& student,
                ConstChunk<Vector> s, Exponentials<Real> q, Real offset, int64_t n, Real weight, Chunk<Vector> slope,
                int64_t ahead) {
  const Real max_gap = teacher.max - student.max;
  const Real inverse_teacher = teacher.inverse_temperature, inverse_student = student.inverse_temperature;
  const Real teacher_max = teacher.max, student_max = student.max;
  // KL is homogeneous in p and q, so both are computed in units of p's factor, which may not be too small to divide by.
  const Real unit = p.factor > Real(1e-30) ? p.factor : Real(1e-30), ratio = q.factor / unit,
             slope_weight = weight * unit;
  Vector total = {};
  for_vectors<Vector>(n, [=, &total](int64_t i, bool last) SAMERGE_INLINE_BODY {
    const Vector t_i = load<Vector>(t.vector(i, last)), s_i = load<Vector>(s.vector(i, last));
    // t - s is exact where they are close, which (t - max) - (s - max) is not.
    const Vector gap = kSameTemperature ? ((t_i - s_i) - max_gap) * inverse_teacher
                                        : (t_i - teacher_max) * inverse_teacher - (s_i - student_max) * inverse_student;
    const Vector d = gap - offset;
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
  Real offset;     // kl: log Z - log Z of the student
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
    normalize(student, a.loss != RowLoss::kl, a.loss == RowLoss::entropy);
    double loss = a.loss == RowLoss::entropy ? student.entropy : 0;
    Real total_weight = 0;

    for (int64_t k = 0; k < a.num_teachers; ++k) {
      Teacher<Vector>& t = teacher[k];
      const int64_t offset = k * a.teacher_stride + r * a.teacher_row_stride;
      t.row.set(static_cast<const char*>(a.teacher) + offset * teachers.bytes, n, is_alone);
      t.weight = a.teacher_weights ? static_cast<const Real*>(a.teacher_weights)[k * a.num_rows + r]
                                   : Real(1) / Real(a.num_teachers);
      total_weight += t.weight;
      if (a.loss == RowLoss::kl) {
        normalize(t.row, false, false);
        t.offset = __builtin_log(t.row.sum / student.sum);
      } else {
        t.target = argmax(t.row);
        loss += t.weight * (student.log_sum - (double(student.number(t.target)) - student.max) * inverse_student);
      }
    }

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
          for (int64_t k = 0; k < a.num_teachers; ++k) {
            const Teacher<Vector>& t = teacher[k];
            const ConstChunk<Vector> numbers = t.row.chunk(begin, count);
            const Exponentials<Real> p = exponentials(t.row, begin, count, numbers, p_buffer);
            loss += t.weight * (k ? add_kl : first_kl)(t.row, numbers, p, student, x, q, t.offset, count,
                                                       t.weight * grad_scale, slope, grad_ahead);
          }
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
