// Numbers as the MX formats store them, 32 of which share a power of two, as FP8 with one float32 scale for 128 does,
// and as NVFP4 does with a row's multiplier: `quant.quantize` with the rules "even" and "amax", and back, so that
// products of numbers are those of stored ones.
#pragma once
#include "../microscale.h"
#include "lanes.h"

namespace microscale {
namespace {

struct Grid {
  int32_t mantissa, emin, emax;  // bits of a fraction; exponents of the least normal number and the greatest
  float max;
  bool integer;  // one step for all numbers
};
// Of ms_format, up to MS_MXINT8.
constexpr Grid kGrids[] = {{1, 0, 2, 6.0f, false},    {3, 0, 2, 7.5f, false},        {2, -2, 4, 28.0f, false},
                           {3, -6, 8, 448.0f, false}, {2, -14, 15, 57344.0f, false}, {6, 0, 0, 127.0f / 64.0f, true}};

// 2^e in two normal factors, so that none is rounded.
struct Power {
  float first, second;
  explicit Power(int32_t e) : first(normal(e >> 1)), second(normal(e - (e >> 1))) {}
  static float normal(int32_t e) { return __builtin_bit_cast(float, (e + 127) << 23); }
};

// v on the grid beside a scale of 2^e, to nearest and ties to even.
inline f32x16 on_grid(f32x16 v, const Grid &g, const Power &down, const Power &up) {
  const u32x16 sign = as_bits(v) & 0x80000000u;
  f32x16 a = as_float(as_bits(v) & 0x7fffffffu) * down.first * down.second;
  a = a > g.max ? splat(g.max) : a;
  i32x16 e = __builtin_bit_cast(i32x16, as_bits(a) >> 23) - 127;
  e = e < g.emin || g.integer ? g.emin - i32x16{} : e;
  const f32x16 finer = __builtin_bit_cast(f32x16, (g.mantissa - e + 127) << 23);
  const f32x16 step = __builtin_bit_cast(f32x16, (e - g.mantissa + 127) << 23);
  const f32x16 whole = (a * finer + 8388608.0f) - 8388608.0f;  // below 2^23 a sum has no room for a fraction
  const f32x16 stored = as_float(as_bits(whole * step * up.first * up.second) | sign);
  return g.integer ? stored + 0.0f : stored;  // integers have no -0
}

// The greatest magnitude's bits: those of infinities and NaNs are above every number's.
template <int N>
inline uint32_t greatest(const f32x16 (&v)[N]) {
  u32x16 most{};
  for (const f32x16 &some : v) {
    const u32x16 bits = as_bits(some) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t amax = 0;
  for (int i = 0; i < kLanes; ++i) amax = most[i] > amax ? most[i] : amax;
  return amax;
}

// A block of 32; NaN where one of them is not finite.
inline void as_stored(f32x16 (&v)[2], const Grid &g) {
  const uint32_t amax = greatest(v);
  if (amax >= 0x7f800000u) {
    v[0] = v[1] = splat(__builtin_nanf(""));
    return;
  }
  int32_t bits = static_cast<int32_t>(amax);
  if (g.emax == 0 && bits < 0x800000) bits = 2 * bits - 0x800000;  // exponents of normal numbers go on to -127
  int32_t scale = ((bits + (1 << (22 - g.mantissa))) >> 23) - g.emax;
  scale = (scale < 0 ? 0 : scale > 254 ? 254 : scale) - 127;
  const Power down(-scale), up(scale);
  for (f32x16 &some : v) some = on_grid(some, g, down, up);
}

// 128 numbers as E4M3 beside a float32 scale; NaN where one of them is not finite.
inline void as_group(f32x16 (&v)[8]) {
  const Grid &g = kGrids[MS_MXFP8_E4M3];
  const uint32_t amax = greatest(v);
  float scale = __builtin_bit_cast(float, amax) / g.max;
  if (scale == 0.0f) scale = 1.0f;
  if (amax >= 0x7f800000u) scale = __builtin_nanf("");
  const Power one(0);
  for (f32x16 &some : v) some = on_grid(some / splat(scale), g, one, one) * scale;
}

// NVFP4's multiplier for a row whose finite numbers are at most `amax`: 1 for zeros.
inline float multiplier(float amax) {
  const float found = amax / (kGrids[MS_MXFP8_E4M3].max * kGrids[MS_MXFP4].max);
  return found > 0.0f ? found : 1.0f;
}

// 16 numbers as E2M1 beside an E4M3 scale and the row's multiplier, which they are then multiplied by, too, or
// (`outer` 1) not; NaN where one of them is not finite.
inline void as_nvfp4(f32x16 (&v)[1], float row, float outer) {
  const Grid &codes = kGrids[MS_MXFP4], &scales = kGrids[MS_MXFP8_E4M3];
  const uint32_t amax = greatest(v);
  if (amax >= 0x7f800000u) {
    v[0] = splat(__builtin_nanf(""));
    return;
  }
  float wanted = __builtin_bit_cast(float, amax) / codes.max / row;
  wanted = wanted < 0x1p-9f ? 0x1p-9f : wanted > scales.max ? scales.max : wanted;
  const Power one(0);
  const float scale = on_grid(splat(wanted), scales, one, one)[0];
  float step = scale * row;
  if (step < 0x1p-149f) step = 0x1p-149f;  // beside a tiny multiplier it may be 0, and 0 / 0 is no code
  v[0] = on_grid(v[0] / splat(step), codes, one, one) * scale * outer;
}

}  // namespace
}  // namespace microscale
