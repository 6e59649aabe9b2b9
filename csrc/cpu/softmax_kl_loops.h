// One row at a time, in chunks that stay in the first-level cache as float (or double). A first pass finds each row's
// largest logit m and Z = sum of exp((x - m) / temperature), rescaled when a chunk brings a larger m, and keeps the
// exponentials where there is room for them; a second pass over the same row computes loss and gradient. What is stored
// as it is computed is read and written where it lies; a last vector that is not full is padded with -inf.
#pragma once

#include "../softmax_kl.h"
#include "levels.h"
#include "simd.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int64_t kChunk = kSoftmaxKlChunk;

// Numbers as whole vectors: those that fill one in place, what is left in a vector of its own.
template <class Number>
struct Chunk {
  Number* values;
  Number* tail;
  int64_t whole;  // numbers at values

  Number* at(int64_t i) const { return i < whole ? values + i : tail + (i - whole); }
  Number* vector(int64_t i, bool last) const { return last ? tail : values + i; }
};

// Calls body(i, last) for every vector of chunks of n numbers, where `last` says that it is not full and lies in the tails.
template <class Vector, class Body>
SAMERGE_INLINE void for_vectors(int64_t n, const Body& body) {
  const int64_t whole = n - n % kLanes<Vector>;
  for (int64_t i = 0; i < whole; i += kLanes<Vector>) body(i, false);
  if (whole < n) body(whole, true);
}

// n numbers to read, with -inf after them; in `buffer` what is stored in another type than it is computed in.
template <class Storage, class Real = lane_t<typename Storage::Vector>>
Chunk<const Real> read_chunk(const void* source, int64_t n, Real* buffer) {  // [n], [n up to whole vectors]
  using Vector = typename Storage::Vector;
  constexpr int kStep = kLanes<Vector>;
  const auto* numbers = static_cast<const typename Storage::Stored*>(source);
  const int rest = n % kStep;
  const int64_t whole = n - rest;
  if (whole && rest) {  // in registers: a load that spans two recent stores would wait for both
    store(buffer + whole, last_lanes(Storage::read(numbers + n - kStep), rest, -__builtin_inff()));
  } else if (rest) {
    typename Storage::Stored few[kStep] = {};
    __builtin_memcpy(few + kStep - rest, numbers, rest * sizeof(few[0]));
    store(buffer, last_lanes(Storage::read(few), rest, -__builtin_inff()));
  }
  if constexpr (Storage::kWide) {
    return {numbers, buffer + whole, whole};
  } else {
    for (int64_t i = 0; i < whole; i += kStep) store(buffer + i, Storage::read(numbers + i));
    return {buffer, buffer + whole, whole};
  }
}

// Where n numbers for `target` are computed, before write_chunk; all in `buffer` where there is no target.
template <class Storage, class Real = lane_t<typename Storage::Vector>>
Chunk<Real> place_chunk(void* target, int64_t n, Real* buffer) {
  const int64_t whole = n - n % kLanes<typename Storage::Vector>;
  if constexpr (Storage::kWide)
    if (target) return {static_cast<Real*>(target), buffer + whole, whole};
  return {buffer, buffer + whole, whole};
}

template <class Storage, class Real = lane_t<typename Storage::Vector>>
void write_chunk(const Chunk<Real>& chunk, void* target, int64_t n) {
  using Vector = typename Storage::Vector;
  auto* numbers = static_cast<typename Storage::Stored*>(target);
  if constexpr (!Storage::kWide)
    for (int64_t i = 0; i < chunk.whole; i += kLanes<Vector>)
      store(numbers + i, Storage::round(load<Vector>(chunk.values + i)));
  if (n == chunk.whole) return;
  typename Storage::Stored few[kLanes<Vector>];
  store(few, Storage::round(load<Vector>(chunk.tail)));
  __builtin_memcpy(numbers + chunk.whole, few, (n - chunk.whole) * sizeof(few[0]));
}

// What knows how numbers are stored.
template <class Real>
struct RowFunctions {
  Chunk<const Real> (*read)(const void*, int64_t, Real*);
  Chunk<Real> (*place)(void*, int64_t, Real*);
  void (*write)(const Chunk<Real>&, void*, int64_t);
  int64_t bytes;  // of a number
};

template <class Storage, class Real>
constexpr RowFunctions<Real> row_functions = {read_chunk<Storage>, place_chunk<Storage>, write_chunk<Storage>,
                                              int64_t(sizeof(typename Storage::Stored))};

// A row of logits and what the first pass leaves of it, with y = (x - max) / temperature.
template <class Real>
struct Row {
  const char* numbers;  // [n]
  RowFunctions<Real> storage;
  int64_t ahead;  // from a number to the one that is fetched into the cache meanwhile, in bytes
  int64_t n;
  Real inverse_temperature;
  Real* exponentials;  // [n up to whole chunks] of each chunk relative to the maximum so far; null where there is no room
  Real* maxima;        // [chunks] those maxima
  Real max;
  double sum;      // Z
  Real scale;      // 1 / Z
  double log_sum;  // log Z: not for the teachers of KL
  double entropy;  // log Z - (sum of exp(y) * y) / Z: no term cancels another

  Chunk<const Real> chunk(int64_t begin, int64_t count, Real* buffer) const {
    return storage.read(numbers + begin * storage.bytes, count, buffer);
  }
};

// Calls body(begin, count, x) with a row's numbers, kChunk of them at a time.
template <class Real, class Body>
SAMERGE_INLINE void for_chunks(const Row<Real>& row, const Body& body) {
  alignas(64) Real buffer[kChunk];
  for (int64_t begin = 0; begin < row.n; begin += kChunk) {
    const int64_t count = row.n - begin < kChunk ? row.n - begin : kChunk;
    body(begin, count, row.chunk(begin, count, buffer));
  }
}

template <class Vector, class Real = lane_t<Vector>>
Real chunk_max(const Chunk<const Real>& x, int64_t n, Real at_least) {
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
void normalize(Row<Real>& row, bool with_log, bool with_entropy) {
  alignas(64) Real unused[kChunk];
  Partition<Real, double> seen = {-__builtin_inff(), 0, 0};
  for_chunks(row, [&](int64_t begin, int64_t count, const Chunk<const Real>& x) {
    const Real larger = chunk_max<Vector>(x, count, seen.max);
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
Exponentials<Real> exponentials(const Row<Real>& row, int64_t begin, int64_t count, const Chunk<const Real>& x,
                                Real* buffer) {
  if (row.exponentials) {
    const Real max = row.maxima[begin / kChunk];
    const Real factor = max == row.max ? Real(1) : Real(__builtin_exp((double(max) - row.max) * row.inverse_temperature));
    return {row.exponentials + begin, factor * row.scale};
  }
  for (int64_t i = 0; i < count; i += kLanes<Vector>)
    store(buffer + i, exp_scaled(load<Vector>(x.at(i)) - row.max, row.inverse_temperature));
  return {buffer, row.scale};
}

// The first position of the largest number.
template <class Vector, class Real = lane_t<Vector>>
int64_t argmax(const Row<Real>& row) {
  Real best = -__builtin_inff();
  int64_t position = 0;
  for_chunks(row, [&](int64_t begin, int64_t count, const Chunk<const Real>& x) {
    const Real larger = chunk_max<Vector>(x, count, best);
    if (!(larger > best)) return;
    best = larger;
    for (position = begin; *x.at(position - begin) != best;) ++position;
  });
  return position;
}

// With offset = log Z of the teacher - log Z of the student:
// slope = before + weight * (q - p) over a chunk, where before is 0 for the first teacher and else what is in slope;
// returns the chunk's part of KL(p || q).
template <class Vector, bool kSameTemperature, bool kFirst, class Real = lane_t<Vector>>
double kl_chunk(const Row<Real>& teacher, Chunk<const Real> t, Exponentials<Real> p, const Row<Real>& student,
                Chunk<const Real> s, Exponentials<Real> q, Real offset, int64_t n, Real weight, Chunk<Real> slope,
                int64_t ahead) {
  const Real max_gap = teacher.max - student.max;
  const Real inverse_teacher = teacher.inverse_temperature, inverse_student = student.inverse_temperature;
  const Real teacher_max = teacher.max, student_max = student.max;
  // KL is homogeneous in p and q, so both are computed in units of p's factor, which may not be too small to divide by.
  const Real unit = p.factor > Real(1e-30) ? p.factor : Real(1e-30), ratio = q.factor / unit, slope_weight = weight * unit;
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
    __builtin_prefetch(place + ahead, 1);
    store(place, (kFirst ? Vector{} : load<Vector>(place)) + term.slope * slope_weight);
  });
  return sum(total) * unit;
}

// slope = weight * d H(q) / d (x / temperature) = -weight * q * (log q + H) over a chunk.
template <class Vector, class Real = lane_t<Vector>>
void entropy_chunk(const Row<Real>& row, Chunk<const Real> x, Exponentials<Real> q, int64_t n, Real weight,
                   Chunk<Real> slope) {
  const Real shift = row.entropy - row.log_sum, factor = -weight * q.factor;
  const Real max = row.max, inverse = row.inverse_temperature;
  for_vectors<Vector>(n, [=](int64_t i, bool last) SAMERGE_INLINE_BODY {
    const Vector e = load<Vector>(q.values + i), y = (load<Vector>(x.vector(i, last)) - max) * inverse;
    store(slope.vector(i, last), e == Real(0) ? Vector{} : e * factor * (y + shift));
  });
}

template <class Real>
struct Teacher {
  Row<Real> row;
  Real weight;
  Real offset;     // kl: log Z - log Z of the student
  int64_t target;  // cross_entropy
};

template <class Vector, class Real = lane_t<Vector>>
void row_losses(const SoftmaxKl& a, const RowFunctions<Real>& students, const RowFunctions<Real>& teachers, int64_t first,
                int64_t last, void* scratch) {
  const Real inverse_student = 1 / a.student_temperature, inverse_teacher = 1 / a.teacher_temperature;
  alignas(64) Real y[kChunk], p_buffer[kChunk], q_buffer[kChunk], slope_buffer[kChunk];
  auto* teacher = static_cast<Teacher<Real>*>(__builtin_alloca(a.num_teachers * sizeof(Teacher<Real>)));  // [K]
  const bool same = inverse_student == inverse_teacher;
  const auto first_kl = same ? kl_chunk<Vector, true, true> : kl_chunk<Vector, false, true>;
  const auto next_kl = same ? kl_chunk<Vector, true, false> : kl_chunk<Vector, false, false>;
  const int64_t chunks = (a.num_columns + kChunk - 1) / kChunk;
  // Short rows follow each other sooner than the processor's own prefetching notices.
  const bool is_short = chunks == 1;
  const int64_t grad_ahead = is_short ? a.num_columns : kChunk;
  auto* room = static_cast<Real*>(scratch);
  auto* maxima = room ? room + (1 + a.num_teachers) * chunks * kChunk : nullptr;
  Row<Real> student;
  // The student is row 0, teacher k row 1 + k.
  for (int64_t k = 0; k <= a.num_teachers; ++k) {
    Row<Real>& row = k ? teacher[k - 1].row : student;
    row.storage = k ? teachers : students;
    row.ahead = row.storage.bytes * (!is_short ? kChunk : k ? a.teacher_row_stride : a.student_stride);
    row.inverse_temperature = k ? inverse_teacher : inverse_student;
    row.exponentials = room ? room + k * chunks * kChunk : nullptr;
    row.maxima = room ? maxima + k * chunks : nullptr;
  }

  for (int64_t r = first; r < last; ++r) {
    const int64_t n = a.num_classes ? a.num_classes[r] : a.num_columns;
    student.numbers = static_cast<const char*>(a.student) + r * a.student_stride * students.bytes;
    student.n = n;
    normalize<Vector>(student, a.loss != RowLoss::kl, a.loss == RowLoss::entropy);
    double loss = a.loss == RowLoss::entropy ? student.entropy : 0;
    Real total_weight = 0;

    for (int64_t k = 0; k < a.num_teachers; ++k) {
      Teacher<Real>& t = teacher[k];
      const int64_t offset = k * a.teacher_stride + r * a.teacher_row_stride;
      t.row.numbers = static_cast<const char*>(a.teacher) + offset * teachers.bytes;
      t.row.n = n;
      t.weight = a.teacher_weights ? static_cast<const Real*>(a.teacher_weights)[k * a.num_rows + r]
                                   : Real(1) / Real(a.num_teachers);
      total_weight += t.weight;
      if (a.loss == RowLoss::kl) {
        normalize<Vector>(t.row, false, false);
        t.offset = __builtin_log(t.row.sum / student.sum);
      } else {
        t.target = argmax<Vector>(t.row);
        const double logit = *student.chunk(t.target, 1, y).at(0);
        loss += t.weight * (student.log_sum - (logit - student.max) * inverse_student);
      }
    }

    char* grad = a.grad ? static_cast<char*>(a.grad) + r * a.num_columns * students.bytes : nullptr;
    const Real grad_scale = grad ? static_cast<const Real*>(a.row_scale)[r] * inverse_student : Real(0);
    if (grad || a.loss == RowLoss::kl) {
      for_chunks(student, [&](int64_t begin, int64_t count, const Chunk<const Real>& x) {
        const Exponentials<Real> q = exponentials<Vector>(student, begin, count, x, q_buffer);
        char* target = grad ? grad + begin * students.bytes : nullptr;
        const Chunk<Real> slope = students.place(target, count, slope_buffer);
        if (a.loss == RowLoss::entropy) {
          entropy_chunk<Vector>(student, x, q, count, grad_scale, slope);
        } else if (a.loss == RowLoss::kl) {
          for (int64_t k = 0; k < a.num_teachers; ++k) {
            const Teacher<Real>& t = teacher[k];
            const Chunk<const Real> numbers = t.row.chunk(begin, count, y);
            const Exponentials<Real> p = exponentials<Vector>(t.row, begin, count, numbers, p_buffer);
            loss += t.weight * (k ? next_kl : first_kl)(t.row, numbers, p, student, x, q, t.offset, count,
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
        if (grad) students.write(slope, target, count);
      });
    }
    if (grad && n < a.num_columns) __builtin_memset(grad + n * students.bytes, 0, (a.num_columns - n) * students.bytes);
    static_cast<Real*>(a.losses)[r] = loss;
  }
}

void softmax_kl(const SoftmaxKl& a, int64_t first, int64_t last, void* scratch) {
  if (a.student_dtype == DType::f64)
    return row_losses<Double>(a, row_functions<F64, double>, row_functions<F64, double>, first, last, scratch);
  constexpr RowFunctions<float> of[] = {row_functions<F32, float>, row_functions<BF16, float>, row_functions<F16, float>};
  row_losses<Float>(a, of[int(a.student_dtype)], of[int(a.teacher_dtype)], first, last, scratch);
}

}  // namespace samerge::SAMERGE_LEVEL
