// A row of logits as it is read, a chunk that stays in the first-level cache at a time, and what a first pass leaves of it.
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

// log p - log q of a class from a teacher's logit t and a student's s.
template <class Vector, bool kSameTemperature, class Real = lane_t<Vector>>
struct LogRatio {
  const Real teacher_max, student_max, max_gap, inverse_teacher, inverse_student, offset;

  // offset = log Z of the teacher - log Z of the student
  SAMERGE_INLINE LogRatio(const Row<Vector>& teacher, const Row<Vector>& student, Real offset)
      : teacher_max(teacher.max),
        student_max(student.max),
        max_gap(teacher.max - student.max),
        inverse_teacher(teacher.inverse_temperature),
        inverse_student(student.inverse_temperature),
        offset(offset) {}
  SAMERGE_INLINE Vector operator()(Vector t, Vector s) const {
    // t - s is exact where they are close, which (t - max) - (s - max) is not.
    const Vector gap = kSameTemperature ? ((t - s) - max_gap) * inverse_teacher
                                        : (t - teacher_max) * inverse_teacher - (s - student_max) * inverse_student;
    return gap - offset;
  }
};

// A chunk of a student and of a teacher.
template <class Vector, class Real = lane_t<Vector>>
struct TwoChunks {
  const Row<Vector>&teacher, &student;
  ConstChunk<Vector> t, s;
  Exponentials<Real> p, q;
  Real offset;  // log Z of the teacher - log Z of the student
  int64_t n;
};

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

}  // namespace samerge::SAMERGE_LEVEL
