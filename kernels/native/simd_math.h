// Functions of sixteen float32 lanes for whichever `Simd` was included before; errors are relative unless said.
#pragma once

namespace distaff {
namespace {

// The terms' coefficients, the highest power first.
template <int kCount>
inline Simd::F polynomial(const float (&terms)[kCount], Simd::F x) {
  Simd::F sum = Simd::all(terms[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kCount; ++i) sum = Simd::fma(sum, x, Simd::all(terms[i]));
  return sum;
}

// e^x within 2 ulp for x up to 88, and as for 88 above; 0 below -87, as for minus infinity. (Cephes' expf.)
inline Simd::F exp(Simd::F x) {
  const uint32_t normal = Simd::at_least(x, Simd::all(-87.0f));
  x = Simd::min(Simd::max(x, Simd::all(-87.0f)), Simd::all(88.0f));
  const Simd::I n = Simd::nearest(Simd::mul(x, Simd::all(1.44269504f)));
  const Simd::F whole = Simd::to_float(n);
  Simd::F r = Simd::fma(whole, Simd::all(-0.693359375f), x);  // ln 2 in two parts
  r = Simd::fma(whole, Simd::all(2.12194440e-4f), r);
  constexpr float kTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                              4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  Simd::F sum = polynomial(kTerms, r);
  sum = Simd::fma(Simd::mul(r, r), sum, Simd::add(r, Simd::all(1.0f)));
  return Simd::choose(normal, Simd::times_power_of_two(sum, n), Simd::zero());
}

// 2^x within 2 ulp for x up to 127; 0, or a number below 2^-126, where that is less.
inline Simd::F exp2(Simd::F x) {
  constexpr float kTerms[] = {1.867130213e-3f, 9.017030019e-3f, 5.579991332e-2f, 2.401644501e-1f, 6.931513118e-1f, 1.0f};
  return Simd::times_two_to(polynomial(kTerms, Simd::above_floor(x)), x);
}

// 2^x within 2^-13, for what is rounded to bfloat16; otherwise likewise.
inline Simd::F rough_exp2(Simd::F x) {
  constexpr float kTerms[] = {7.802452266e-2f, 2.260671554e-1f, 6.958335405e-1f, 9.999252186e-1f};
  return Simd::times_two_to(polynomial(kTerms, Simd::above_floor(x)), x);
}

// Within 1e-6 for |x| up to 10 and 1e-5 up to 87; less than 2e-38 below -87.
inline Simd::F sigmoid(Simd::F x) {
  const Simd::F one = Simd::all(1.0f);
  return Simd::div(one, Simd::add(one, exp2(Simd::min(Simd::mul(x, Simd::all(-1.44269504f)), Simd::all(126.0f)))));
}

// 1 - 2 / (e^2x + 1), within 2e-7, absolute.
inline Simd::F tanh(Simd::F x) {
  const Simd::F one = Simd::all(1.0f);
  return Simd::sub(one, Simd::div(Simd::all(2.0f), Simd::add(exp(Simd::add(x, x)), one)));
}

// The error function within 2e-7, absolute. (Abramowitz and Stegun 7.1.26.)
inline Simd::F erf(Simd::F x) {
  const Simd::F one = Simd::all(1.0f), size = Simd::abs(x);
  const Simd::F t = Simd::div(one, Simd::fma(size, Simd::all(0.3275911f), one));
  constexpr float kTerms[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  const Simd::F tail = Simd::mul(Simd::mul(polynomial(kTerms, t), t), exp(Simd::sub(Simd::zero(), Simd::mul(x, x))));
  return Simd::with_sign_of(Simd::max(Simd::sub(one, tail), Simd::zero()), x);
}

inline Simd::F silu(Simd::F x) { return Simd::mul(x, sigmoid(x)); }

inline Simd::F gelu(Simd::F x) {
  const Simd::F half = Simd::mul(x, Simd::all(0.5f));
  return Simd::fma(half, erf(Simd::mul(x, Simd::all(0.70710678f))), half);
}

// x (1 + tanh(u)) / 2 = x sigmoid(2u)
inline Simd::F gelu_tanh(Simd::F x) {
  const Simd::F inner = Simd::fma(Simd::mul(x, x), Simd::all(0.0713548163f), Simd::all(1.59576912f));
  return Simd::mul(x, sigmoid(Simd::mul(x, inner)));
}

}  // namespace
}  // namespace distaff
