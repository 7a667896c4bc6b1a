// The non-linearities of microscale.activations in float32, for one or several vectors at a time.
#pragma once
#include <math.h>
#ifdef __AVX2__
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
#if defined(__AVX2__) && !defined(__AVX512F__)
inline f32r between(float low, f32r v, float high) {
  return _mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), v));
}
inline f32r nearest_integer(f32r v) { return (v + 12582912.0f) - 12582912.0f; }
inline f32r times_power_of_two(f32r v, f32r exponent) {
  const __m256i e = _mm256_cvttps_epi32(exponent), half = _mm256_srai_epi32(e, 1);
  const auto power = [](__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  };
  return v * power(half) * power(_mm256_sub_epi32(e, half));
}
inline f32r reciprocal(f32r v) { return 1.0f / v; }
#endif

template <class T, int N>
MS_INLINE Several<T, N> between(float low, const Several<T, N> &v, float high) {
  return v.each([low, high](T a) { return between(low, a, high); });
}
template <class T, int N>
MS_INLINE Several<T, N> nearest_integer(const Several<T, N> &v) {
  return v.each([](T a) { return nearest_integer(a); });
}
template <class T, int N>
MS_INLINE Several<T, N> times_power_of_two(const Several<T, N> &v, const Several<T, N> &exponent) {
  return v.each([](T a, T b) { return times_power_of_two(a, b); }, exponent);
}
template <class T, int N>
MS_INLINE Several<T, N> reciprocal(const Several<T, N> &v) {
  return v.each([](T a) { return reciprocal(a); });
}

// Below, V is a vector or several of them.

// e^v within 1.5 ulp, down to subnormals and 0, and at most e^most: the usual reduction by ln 2 and a degree 6
// polynomial (Cody and Waite; coefficients of Cephes' expf).
template <class V>
MS_INLINE V exponential(V v, float most = 88.02f) {
  v = between(-105.0f, v, most);
  const V n = nearest_integer(v * 1.44269504f);
  V r = v - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return times_power_of_two(p, n);
}

// Not 1 / (1 + e^-v), which stays above 0 where e^-v has no room: -1e30 times it would be no silu.
template <class V>
MS_INLINE V sigmoid(V v) {
  const V e = exponential(v, 40.0f);
  return e * reciprocal(1.0f + e);
}

// Of each lane a where v is less than the limit, else b.
template <class T>
inline T less(T v, float limit, T a, T b) {
  return v < limit ? a : b;
}
template <class T, int N>
MS_INLINE Several<T, N> less(const Several<T, N> &v, float limit, const Several<T, N> &a, const Several<T, N> &b) {
  return v.each([limit](T x, T y, T z) { return less(x, limit, y, z); }, a, b);
}

template <class V>
MS_INLINE V hyperbolic_tangent(V v) {
  const V s = v * v;
  V p = s * -5.70498872745e-3f + 2.06390887954e-2f;  // near zero: Cephes' tanhf
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const V near = p * s * v + v;
  const V far = 1.0f - 2.0f * reciprocal(exponential(v + v) + 1.0f);
  return less(s, 0.390625f, near, far);
}

// NaN passes every clamp.
template <class V>
MS_INLINE V at_most(V v, float limit) {
  return between(-INFINITY, v, limit);
}
template <class V>
MS_INLINE V within(V v, float limit) {
  return between(-limit, v, limit);
}

template <class T>
inline T gelu(T v) {
  T r;
  for (size_t i = 0; i < sizeof v / 4; ++i) r[i] = 0.5f * v[i] * erfcf(v[i] * -0.707106781f);
  return r;
}
template <class T, int N>
MS_INLINE Several<T, N> gelu(const Several<T, N> &v) {
  return v.each([](T a) { return gelu(a); });
}

template <class T>
inline T square_of_positive(T v) {
  return v > 0.0f ? v * v : (v != v ? v : T{});
}
template <class T, int N>
MS_INLINE Several<T, N> square_of_positive(const Several<T, N> &v) {
  return v.each([](T a) { return square_of_positive(a); });
}

template <int kKind, class V>
MS_INLINE V activated(V g, V u, const ms_activation &a) {
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
      g = square_of_positive(g);
  }
  return a.gated ? g * within(u, limit) : g;
}

}  // namespace
}  // namespace microscale
