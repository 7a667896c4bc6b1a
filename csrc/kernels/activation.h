// The non-linearities of microscale.activations in float32, 16 at a time.
#pragma once
#include <math.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "../microscale.h"
#include "lanes.h"

namespace microscale {
namespace {

#ifdef __AVX512F__
// v between two limits, or NaN: the instructions take their second operand where either is one.
inline f32x16 between(float low, f32x16 v, float high) {
  return _mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), v));
}
inline f32x16 nearest_integer(f32x16 v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline f32x16 times_power_of_two(f32x16 v, f32x16 exponent) { return _mm512_scalef_ps(v, exponent); }
// 1 / v within 1 ulp for v from 1 to 2^127: an estimate and one step of Newton's, a third of what a division takes.
inline f32x16 reciprocal(f32x16 v) {
  const __m512 estimate = _mm512_rcp14_ps(v);
  return _mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(estimate, v, _mm512_set1_ps(1.0f)), estimate);
}
#else
inline f32x16 between(float low, f32x16 v, float high) {
  v = v > high ? splat(high) : v;
  return v < low ? splat(low) : v;
}
inline f32x16 nearest_integer(f32x16 v) { return (v + 12582912.0f) - 12582912.0f; }  // by 1.5 * 2^23
inline f32x16 times_power_of_two(f32x16 v, f32x16 exponent) {
  // In two factors, so that 2^128 is no infinity of its own.
  const i32x16 e = __builtin_convertvector(exponent, i32x16), half = e >> 1;
  const i32x16 first = (half + 127) << 23, second = (e - half + 127) << 23;
  return v * __builtin_bit_cast(f32x16, first) * __builtin_bit_cast(f32x16, second);
}
inline f32x16 reciprocal(f32x16 v) { return 1.0f / v; }
#endif

// e^v within 1.5 ulp, and at most 2^127: the usual reduction by ln 2 and a degree 6 polynomial (Cody and Waite;
// coefficients of Cephes' expf).
inline f32x16 exponential(f32x16 v) {
  v = between(-87.33f, v, 88.02f);
  const f32x16 n = nearest_integer(v * 1.44269504f);
  f32x16 r = v - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return times_power_of_two(p, n);
}

inline f32x16 sigmoid(f32x16 v) { return reciprocal(1.0f + exponential(-v)); }

inline f32x16 hyperbolic_tangent(f32x16 v) {
  const f32x16 s = v * v;
  f32x16 p = s * -5.70498872745e-3f + 2.06390887954e-2f;  // near zero: Cephes' tanhf
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const f32x16 near = p * s * v + v;
  const f32x16 far = 1.0f - 2.0f * reciprocal(exponential(v + v) + 1.0f);
  return s < 0.390625f ? near : far;
}

// NaN passes every clamp.
inline f32x16 at_most(f32x16 v, float limit) { return between(-INFINITY, v, limit); }
inline f32x16 within(f32x16 v, float limit) { return between(-limit, v, limit); }

inline f32x16 gelu(f32x16 v) {
  f32x16 r;
  for (int i = 0; i < kLanes; ++i) r[i] = 0.5f * v[i] * erfcf(v[i] * -0.707106781f);
  return r;
}

template <int kKind>
inline f32x16 activated(f32x16 g, f32x16 u, const ms_activation &a) {
  const float limit = a.limit;
  switch (kKind) {
    case MS_SILU:
      g = at_most(g, limit);
      g = g * sigmoid(g);
      break;
    case MS_SWIGLU_OAI:
      g = at_most(g, limit);
      g = g * sigmoid(a.alpha * g);
      return a.gated ? g * (within(u, limit) + a.beta) : g;
    case MS_SWIGLU_STEP: g = at_most(g * sigmoid(g), limit); break;
    case MS_SITU:
      g = a.beta * hyperbolic_tangent(g / a.beta) * sigmoid(g);
      return a.gated ? g * (a.alpha * hyperbolic_tangent(u / a.alpha)) : g;
    case MS_GELU: g = gelu(g); break;
    case MS_GELU_TANH:  // 1 + tanh(y) = 2 sigmoid(2 y)
      g = g * sigmoid(g * 1.59576912f * (1.0f + 0.044715f * g * g));
      break;
    default:  // MS_RELU2
      g = g > 0.0f ? g * g : (g != g ? g : splat(0.0f));
  }
  return a.gated ? g * within(u, limit) : g;
}

}  // namespace
}  // namespace microscale
