// Arithmetic of softmax_kl that the loops on the CPU and the kernels on the GPU share. A Vector is one of simd.h there and
// one number here: comparisons, `? :`, & and | mean the same. The includer sets SAMERGE_LEVEL and SAMERGE_INLINE.
#pragma once

namespace samerge::SAMERGE_LEVEL {

// exp(-d) - 1 + d for |d| <= 1/4, to full relative precision of a float: it is d^2 / 2 to first order, which the plain form
// loses.
template <class Vector>
SAMERGE_INLINE Vector exp_remainder_series(Vector d) {
  Vector y = d * 1.3895343127e-03f - 8.3488389465e-03f;
  y = y * d + 4.1666717171e-02f;
  y = y * d - 1.6666642462e-01f;
  y = y * d + 4.9999999937e-01f;
  return y * (d * d);
}

// 2 artanh(x / (2 + x)) = log(1 + x) for -0.3 <= x <= 0.42, to full relative precision of a float.
template <class Vector>
SAMERGE_INLINE Vector log_near_one(Vector x) {
  const Vector s = x / (x + 2.f), z = s * s;
  Vector y = z * 0.2222222222f + 0.2857142857f;
  y = y * z + 0.4f;
  y = y * z + 0.6666666667f;
  return s * (y * z + 2.f);
}

template <class Vector>
struct KlTerm {
  Vector loss;   // p * log(p / q) + q - p
  Vector slope;  // q - p
};

// One class, with p and q in any common unit, d = log p - log q and remainder = exp(-d) - 1 + d. KL is summed as p * remainder, which equals
// p * d + q - p: every term is >= 0 and the roundings of log Z enter squared, so that the loss keeps its digits where student
// and teacher nearly agree.
template <class Real, class Vector>
SAMERGE_INLINE KlTerm<Vector> kl_term(Vector p, Vector q, Vector d, Vector remainder) {
  const auto close = d * d < Real(0.0625);
  const Vector difference = close ? p * (remainder - d) : q - p;
  const Vector finite =
      p == Real(0) ? Vector{} - Real(1) : d;  // what p = 0 is multiplied with: d may be infinite there
  return {close ? p * remainder : p * finite + difference, difference};
}

// What a first pass knows of the numbers x it has seen, with y = (x - max) / temperature.
template <class Real, class Sum>
struct Partition {
  Real max;      // -inf at first
  Sum sum;       // of exp(y)
  Sum weighted;  // of exp(y) * y, for entropies
};

// The partition by a larger maximum, where shift = (max - larger) / temperature <= 0 and factor = exp(shift).
template <class Real, class Sum>
SAMERGE_INLINE Partition<Real, Sum> rescaled(const Partition<Real, Sum>& a, Real larger, Sum shift, Sum factor) {
  return {larger, a.sum * factor, factor == 0 ? Sum(0) : factor * (a.weighted + a.sum * shift)};
}

}  // namespace samerge::SAMERGE_LEVEL
