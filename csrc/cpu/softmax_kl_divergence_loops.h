// Reverse KL and the Jensen-Shannon divergence over a chunk of a row, in two passes: the first has the row's loss and the mean of
// the derivatives by q, which every number of the gradient needs, the second the gradient. Probabilities and derivatives are
// computed in both.
#pragma once

#include "../softmax_kl_divergences.h"
#include "softmax_kl_row.h"

namespace samerge::SAMERGE_LEVEL {

// Calls body(i, last, q, term) for every vector.
template <class Vector, bool kJsd, bool kSameTemperature, class Body, class Real = lane_t<Vector>>
SAMERGE_INLINE void for_terms(const TwoChunks<Vector>& two, Real beta, Real rest, const Body& body) {
  const LogRatio<Vector, kSameTemperature> log_ratio(two.teacher, two.student, two.offset);
  const ConstChunk<Vector> t = two.t, s = two.s;
  const Real *p_values = two.p.values, *q_values = two.q.values;
  const Real p_factor = two.p.factor, q_factor = two.q.factor;
  for_vectors<Vector>(two.n, [=, &body](int64_t i, bool last) SAMERGE_INLINE_BODY {
    const Vector p = load<Vector>(p_values + i) * p_factor, q = load<Vector>(q_values + i) * q_factor;
    const Vector d = log_ratio(load<Vector>(t.vector(i, last)), load<Vector>(s.vector(i, last)));
    if constexpr (kJsd) {
      body(i, last, q, jsd_term<Real>(p, q, d, beta, rest));
    } else {
      body(i, last, q, reverse_kl_term<Real>(p, q, d));
    }
  });
}

struct DivergenceSums {
  double loss, mean;  // of the derivatives by q, each times q
};

template <class Vector, bool kJsd, bool kSameTemperature, class Real = lane_t<Vector>>
DivergenceSums divergence_sums(const TwoChunks<Vector>& two, Real beta, Real rest) {
  Vector loss = {}, mean = {};
  for_terms<Vector, kJsd, kSameTemperature>(
      two, beta, rest, [&](int64_t, bool, Vector q, const DivergenceTerm<Vector>& term) SAMERGE_INLINE_BODY {
    loss += term.loss;
    mean += q == Real(0) ? Vector{} : q * term.by_q;
  });
  return {sum(loss), sum(mean)};
}

// slope = weight * the derivatives by q, or added to it.
template <class Vector, bool kJsd, bool kSameTemperature, class Real = lane_t<Vector>>
void divergence_slopes(const TwoChunks<Vector>& two, Real beta, Real rest, Real weight, bool add, Chunk<Vector> slope) {
  for_terms<Vector, kJsd, kSameTemperature>(
      two, beta, rest, [=](int64_t i, bool last, Vector, const DivergenceTerm<Vector>& term) SAMERGE_INLINE_BODY {
    Real* place = slope.vector(i, last);
    store(place, add ? load<Vector>(place) + weight * term.by_q : weight * term.by_q);
  });
}

// slope = weight * q * (slope - mean): the gradient by x / temperature.
template <class Vector, class Real = lane_t<Vector>>
void center_slopes(Exponentials<Real> q, int64_t n, Real mean, Real weight, Chunk<Vector> slope) {
  const Real factor = weight * q.factor;
  for_vectors<Vector>(n, [=](int64_t i, bool last) SAMERGE_INLINE_BODY {
    const Vector e = load<Vector>(q.values + i);
    Real* place = slope.vector(i, last);
    store(place, e == Real(0) ? Vector{} : e * factor * (load<Vector>(place) - mean));
  });
}

// The functions above for a divergence and its temperatures.
template <class Vector, class Real = lane_t<Vector>>
struct DivergenceLoops {
  DivergenceSums (*sums)(const TwoChunks<Vector>&, Real, Real);
  void (*slopes)(const TwoChunks<Vector>&, Real, Real, Real, bool, Chunk<Vector>);
};

template <class Vector>
DivergenceLoops<Vector> divergence_loops(bool jsd, bool same_temperature) {
  if (jsd && same_temperature) return {divergence_sums<Vector, true, true>, divergence_slopes<Vector, true, true>};
  if (jsd) return {divergence_sums<Vector, true, false>, divergence_slopes<Vector, true, false>};
  if (same_temperature) return {divergence_sums<Vector, false, true>, divergence_slopes<Vector, false, true>};
  return {divergence_sums<Vector, false, false>, divergence_slopes<Vector, false, false>};
}

}  // namespace samerge::SAMERGE_LEVEL
