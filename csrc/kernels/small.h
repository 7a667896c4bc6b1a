// The operators between a token's products, in float32, rounded where a model's modules round.
#pragma once
#include "rows.h"
#include "small_table.h"

namespace microscale {
namespace {

inline f32x16 rounded_to(int dtype, f32x16 v) {
  if (dtype == MS_FP32) return v;
  return dtype == MS_BF16 ? from_bf16(to_bf16(v)) : from_fp16(to_fp16(v));
}

inline void small_norm(const SmallNorm *norm) {
  const SmallNorm &p = *norm;
  const void *x = p.more ? p.sum : p.x;
  f32x16 squares{};
  for (int64_t i = 0; i < p.n; i += kLanes) {
    const int64_t count = lanes_left(p.n, i);
    f32x16 v = load_as(p.dtype, p.x, i, count);
    if (p.more) {
      v = rounded_to(p.dtype, v + load_as(p.dtype, p.more, i, count));
      store_as(p.dtype, p.sum, i, v, count);
    }
    squares += v * v;
  }
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += squares[i];
  const float scale = 1 / __builtin_sqrtf(sum / static_cast<float>(p.n) + p.epsilon);
  for (int64_t i = 0; i < p.n; i += kLanes) {
    const int64_t count = lanes_left(p.n, i);
    f32x16 v = load_as(p.dtype, x, i, count) * scale;
    if (p.twice) v = rounded_to(p.dtype, v);
    store_as(p.dtype, p.y, i, load_as(p.weight_dtype, p.w, i, count) * v, count);
  }
}

inline void small_turn(int dtype, const void *x, int64_t half, const void *cos, const void *sin, void *y) {
  const int64_t size = dtype == MS_FP32 ? 4 : 2;
  const auto *second = static_cast<const uint8_t *>(x) + half * size;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = lanes_left(half, i);
    const f32x16 a = load_as(dtype, x, i, count), b = load_as(dtype, second, i, count);
    const f32x16 c = load_as(dtype, cos, i, count), s = load_as(dtype, sin, i, count);
    store_as(dtype, y, i, rounded_to(dtype, a * c) - rounded_to(dtype, b * s), count);
    store_as(dtype, static_cast<uint8_t *>(y) + half * size, i, rounded_to(dtype, b * c) + rounded_to(dtype, a * s),
             count);
  }
}

template <int kKind>
void small_gate_as(int dtype, const ms_activation &alone, const void *gate, const void *up, int64_t n, void *y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = lanes_left(n, i);
    const f32x16 g = rounded_to(dtype, activated<kKind>(load_as(dtype, gate, i, count), f32x16{}, alone));
    store_as(dtype, y, i, g * load_as(dtype, up, i, count), count);
  }
}

inline void small_gate(int dtype, const ms_activation *activation, const void *gate, const void *up, int64_t n,
                       void *y) {
  ms_activation alone = *activation;
  alone.gated = 0;
  switch (alone.kind) {
    case MS_SILU: return small_gate_as<MS_SILU>(dtype, alone, gate, up, n, y);
    case MS_GELU: return small_gate_as<MS_GELU>(dtype, alone, gate, up, n, y);
    case MS_GELU_TANH: return small_gate_as<MS_GELU_TANH>(dtype, alone, gate, up, n, y);
    default: return small_gate_as<MS_RELU2>(dtype, alone, gate, up, n, y);
  }
}

inline void small_load(int dtype, const void *x, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = lanes_left(n, i);
    store_as(MS_FP32, out, i, load_as(dtype, x, i, count), count);
  }
}

inline void small_round(int dtype, float *v, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = lanes_left(n, i);
    store_as(MS_FP32, v, i, rounded_to(dtype, load_as(MS_FP32, v, i, count)), count);
  }
}

template <int N>
inline void load_block(int dtype, const void *x, int64_t i, int64_t n, f32x16 (&v)[N]) {
  for (int part = 0; part < N; ++part, i += kLanes) v[part] = i < n ? load_as(dtype, x, i, lanes_left(n, i)) : f32x16{};
}

template <int N>
inline void store_block(int dtype, void *y, int64_t i, int64_t n, const f32x16 (&v)[N]) {
  for (int part = 0; part < N && i < n; ++part, i += kLanes) store_as(dtype, y, i, v[part], lanes_left(n, i));
}

// The greatest magnitude of a row's finite numbers.
inline float greatest_of_row(int dtype, const void *x, int64_t n) {
  u32x16 most{};
  for (int64_t i = 0; i < n; i += kLanes) {
    u32x16 bits = as_bits(load_as(dtype, x, i, lanes_left(n, i))) & 0x7fffffffu;
    bits = bits < 0x7f800000u ? bits : u32x16{};
    most = bits > most ? bits : most;
  }
  const f32x16 v[] = {as_float(most)};
  return __builtin_bit_cast(float, greatest(v));
}

// N registers of numbers at a time, which `round` changes.
template <int N, typename Round>
inline void stored_by(int dtype, const void *x, int64_t n, int to, void *y, Round round) {
  for (int64_t i = 0; i < n; i += N * kLanes) {
    f32x16 v[N];
    load_block(dtype, x, i, n, v);
    round(v);
    store_block(to, y, i, n, v);
  }
}

inline void small_stored(int format, int dtype, const void *x, int64_t n, int to, void *y, float *outer) {
  if (format == MS_NVFP4) {
    const float row = multiplier(greatest_of_row(dtype, x, n)), rest = outer ? 1.0f : row;
    if (outer) *outer = row;
    stored_by<1>(dtype, x, n, to, y, [row, rest](f32x16(&v)[1]) { as_nvfp4(v, row, rest); });
  } else if (format == MS_FP8_BLOCK128) {
    stored_by<8>(dtype, x, n, to, y, as_group);
  } else {
    stored_by<2>(dtype, x, n, to, y, [format](f32x16(&v)[2]) { as_stored(v, kGrids[format]); });
  }
}

}  // namespace
}  // namespace microscale
