// exp and what is made of it, in 16 lanes. Own polynomials: a library's would differ between machines.
#pragma once

#include "simd.h"

namespace octavo::OCTAVO_ISA {

// e^x for x <= 88.7: x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, after Cody and Waite), and a polynomial of
// degree 7 for e^r with the coefficients of the Cephes library's expf. Below -87.3 the result is 0, so a score of -inf
// weighs nothing; above 88.7 it stays at its highest finite value. NaN gives NaN: the order of the operands of max and
// min sees to it.
OCTAVO_INLINE F exp(F x) {
  constexpr float kLowest = -87.33654f;
  const F clamped = min(set1(88.37626f), max(set1(kLowest), x));  // then n is in [-126, 127]
  const F n = round(mul(clamped, set1(1.44269504f)));
  const F r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), clamped));
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, set1(1.0f)));
  const F power = as_float(shift_left(addi(to_int(n), set1i(127)), 23));  // 2^n
  return select_less(x, set1(kLowest), zero(), mul(p, power));
}

// e^x for x <= 0, to 3 in a million, and exactly 1 for 0: for weights that are rounded to 255 steps. 2^n times a
// polynomial for 2^f with |f| <= 1/2, of the least relative error with that degree. Below -69.3 it is 2^-100, nothing
// beside a sum that begins with 1, and far from denormals. NaN gives NaN.
OCTAVO_INLINE F exp_of_weight(F x) {
  const F t = max(set1(-100.0f), mul(x, set1(1.44269504f)));
  const F n = round(t);
  const F f = sub(t, n);
  F p = set1(9.584325366e-3f);
  p = fma(p, f, set1(5.590752140e-2f));
  p = fma(p, f, set1(2.402406633e-1f));
  p = fma(p, f, set1(6.931239963e-1f));
  p = fma(p, f, set1(1.0f));
  return as_float(addi(as_int(p), shift_left(to_int(n), 23)));
}

// x / (1 + e^u), where e^u may be beyond the floats: then 0, however large x is.
OCTAVO_INLINE F over_one_plus_exp(F x, F u) {
  return div(x, select_less(set1(88.0f), u, set1(INFINITY), add(set1(1.0f), exp(u))));
}

// x / (1 + e^-x)
OCTAVO_INLINE F silu(F x) { return over_one_plus_exp(x, sub(zero(), x)); }

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), by (1 + tanh u) / 2 = 1 / (1 + e^-2u)
OCTAVO_INLINE F gelu_tanh(F x) {
  const F cube = mul(mul(x, x), x);
  const F u = mul(set1(0.7978845608f), fma(set1(0.044715f), cube, x));
  return over_one_plus_exp(x, mul(set1(-2.0f), u));
}

// 127 / top, by which values up to `top` become int8 codes; 0 where codes mean nothing: top is not finite, or so small
// that 127 / top is not.
OCTAVO_INLINE float steps_per_unit(float top) {
  const float steps = 127.0f / top;
  return top > 0.0f && steps > 0.0f && steps < INFINITY ? steps : 0.0f;
}

}  // namespace octavo::OCTAVO_ISA
