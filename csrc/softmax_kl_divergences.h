// Reverse KL and the Jensen-Shannon divergence, class by class, as softmax_kl_math.h has KL. The includer has defined
// exp_remainder(d) = exp(-d) - 1 + d for |d| <= 1/4, and log_one_plus(x, y), the logarithm of y = 1 + x in 0 ... 2, which near 1
// x says more exactly than y.
#pragma once

#include "softmax_kl_math.h"

namespace samerge::SAMERGE_LEVEL {

template <class Vector>
struct DivergenceTerm {
  Vector loss;  // >= 0
  Vector by_q;  // the derivative of a row's loss by q, up to what is the same for the row; anything where q = 0
};

// One class of q * log(q / p), as kl_term has it.
template <class Real, class Vector>
SAMERGE_INLINE DivergenceTerm<Vector> reverse_kl_term(Vector p, Vector q, Vector d) {
  return {kl_term<Real>(q, p, -d, exp_remainder(-d)).loss, -d};
}

// One class of beta * p * log(p / m) + rest * q * log(q / m), m = beta * p + rest * q, rest = 1 - beta. How far m is from what
// it has most of has a bounded logarithm, and one that keeps its digits where p and q nearly agree or beta is nearly 0.
template <class Real, class Vector>
SAMERGE_INLINE DivergenceTerm<Vector> jsd_term(Vector p, Vector q, Vector d, Real beta, Real rest) {
  const auto mostly_p = beta * p > rest * q;
  const Vector most = mostly_p ? p : q, other = mostly_p ? q : p, fall = mostly_p ? d : -d;  // log(most / other)
  const Vector of_most = mostly_p ? Vector{} + beta : Vector{} + rest;
  const Vector of_other = mostly_p ? Vector{} + rest : Vector{} + beta;
  const Vector ratio = most > Real(0) ? other / most : Vector{};
  const Vector change = fall * fall < Real(0.0625) ? exp_remainder(fall) - fall : ratio - Real(1);
  const Vector log_m = log_one_plus(of_other * change, of_most + of_other * ratio);          // log(m / most)
  const Vector by_p = mostly_p ? -log_m : d - log_m, by_q = mostly_p ? -d - log_m : -log_m;  // log(p / m), log(q / m)
  const Vector m = beta * p + rest * q;
  return {beta * kl_term<Real>(p, m, by_p, exp_remainder(by_p)).loss +
              rest * kl_term<Real>(q, m, by_q, exp_remainder(by_q)).loss,
          rest * by_q};
}

}  // namespace samerge::SAMERGE_LEVEL
