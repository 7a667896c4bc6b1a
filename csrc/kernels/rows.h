// Rows of numbers around the products: operands in, activations between, results out.
#pragma once
#include "activation.h"
#include "stored.h"
#include "table.h"

namespace microscale {
namespace {

inline f32x16 load_as(int dtype, const void *x, int64_t i, int64_t n) {
  if (dtype == MS_FP32) {
    const float *p = static_cast<const float *>(x) + i;
    return n == kLanes ? load_lanes<f32x16>(p) : load_lanes<f32x16>(p, n);
  }
  const uint16_t *p = static_cast<const uint16_t *>(x) + i;
  const u16x16 v = n == kLanes ? load_lanes<u16x16>(p) : load_lanes<u16x16>(p, n);
  return dtype == MS_BF16 ? from_bf16(v) : from_fp16(v);
}

inline void store_as(int dtype, void *y, int64_t i, f32x16 v, int64_t n) {
  if (dtype == MS_FP32) {
    float *p = static_cast<float *>(y) + i;
    n == kLanes ? store_lanes(p, v) : store_lanes(p, v, n);
    return;
  }
  const u16x16 half = dtype == MS_BF16 ? to_bf16(v) : to_fp16(v);
  uint16_t *p = static_cast<uint16_t *>(y) + i;
  n == kLanes ? store_lanes(p, half) : store_lanes(p, half, n);
}

// To an operand. Instructions that multiply bfloat16 take subnormal numbers as zero, as the conversion does that goes
// with them.
template <int kOperand>
inline void store_operand(void *y, int64_t i, f32x16 v, int64_t n) {
#ifdef __AVX512BF16__
  if (kOperand == MS_BF16) {
    const __m256bh half = _mm512_cvtneps_pbh(v);
    uint16_t *p = static_cast<uint16_t *>(y) + i;
    const u16x16 bits = __builtin_bit_cast(u16x16, half);
    n == kLanes ? store_lanes(p, bits) : store_lanes(p, bits, n);
    return;
  }
#endif
  store_as(kOperand, y, i, v, n);
}

inline int64_t lanes_left(int64_t n, int64_t i) { return n - i < kLanes ? n - i : kLanes; }

inline f32x16 finished(f32x16 raw, const float *outer, const float *bias, int64_t i, int64_t n) {
  if (outer) raw = raw * load_as(MS_FP32, outer, i, n);
  if (bias) raw = raw + load_as(MS_FP32, bias, i, n);
  return raw;
}

template <int kOperand>
void load_row(int dtype, const void *x, int64_t n, float factor, void *operands, int64_t step) {
  auto *out = static_cast<uint8_t *>(operands);
  constexpr int64_t kBytes = kOperand == MS_FP32 ? 128 : 64;
  int64_t i = 0;
  if (dtype == kOperand && factor == 1.0f)
    for (; i + 32 <= n; i += 32, out += step)
      __builtin_memcpy(out, static_cast<const uint8_t *>(x) + i / 32 * kBytes, kBytes);
  for (; i < n; i += 32, out += step)
    for (int64_t part = 0; part < 32; part += kLanes) {
      const int64_t count = n > i + part ? lanes_left(n, i + part) : 0;
      f32x16 v{};
      if (count) v = load_as(dtype, x, i + part, count);
      if (factor != 1.0f) v = v * factor;
      for (int64_t j = count; j < kLanes; ++j) v[j] = 0.0f;  // zero, even where the factor is infinite
      store_operand<kOperand>(out, part, v, kLanes);
    }
}

inline void add_row(const float *raw, const float *outer, const float *bias, float weight, int64_t n, float *sum) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = lanes_left(n, i);
    const f32x16 v = finished(load_as(MS_FP32, raw, i, count), outer, bias, i, count);
    store_as(MS_FP32, sum, i, load_as(MS_FP32, sum, i, count) + weight * v, count);
  }
}

inline void store_row(const float *raw, const float *outer, const float *bias, int64_t n, int dtype, void *y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = lanes_left(n, i);
    store_as(dtype, y, i, finished(load_as(MS_FP32, raw, i, count), outer, bias, i, count), count);
  }
}

// Every second of a's and b's numbers, from the first or the second on.
template <int kFrom>
inline f32x16 every_second(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, kFrom, kFrom + 2, kFrom + 4, kFrom + 6, kFrom + 8, kFrom + 10, kFrom + 12,
                                 kFrom + 14, kFrom + 16, kFrom + 18, kFrom + 20, kFrom + 22, kFrom + 24, kFrom + 26,
                                 kFrom + 28, kFrom + 30);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
template <int kFrom>
inline f32r every_second(f32r a, f32r b) {
  return __builtin_shufflevector(a, b, kFrom, kFrom + 2, kFrom + 4, kFrom + 6, kFrom + 8, kFrom + 10, kFrom + 12,
                                 kFrom + 14);
}
#endif

// A register of raw sums from the i-th on.
inline f32r finished(const float *raw, const float *outer, const float *bias, int64_t i) {
  f32r v = load_lanes<f32r>(raw + i);
  if (outer) v = v * load_lanes<f32r>(outer + i);
  if (bias) v = v + load_lanes<f32r>(bias + i);
  return v;
}

// R registers of results, from the i-th on of as many rows.
template <int kOperand, int kKind, int R>
MS_INLINE void activate_whole(const Activate &a, int64_t row, int64_t i) {
  const ms_activation &kind = *a.activation;
  Several<f32r, R> g, u{};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const float *gate = a.gate + (row + r) * a.stride;
    if (kind.gated && kind.interleaved) {
      const f32r first = finished(gate, a.gate_outer, a.gate_bias, 2 * i);
      const f32r second = finished(gate, a.gate_outer, a.gate_bias, 2 * i + kRegisterLanes);
      g.v[r] = every_second<0>(first, second);
      u.v[r] = every_second<1>(first, second);
    } else {
      g.v[r] = finished(gate, a.gate_outer, a.gate_bias, i);
      if (kind.gated) u.v[r] = finished(a.up + (row + r) * a.stride, a.up_outer, a.up_bias, i);
    }
  }
  const Several<f32r, R> result = activated<kKind>(g, u, kind);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if constexpr (kRegisterLanes == kLanes)
      store_operand<kOperand>(a.out[row + r], i, result.v[r], kLanes);
    else
      store_lanes(static_cast<float *>(a.out[row + r]) + i, result.v[r]);
  }
}

// The last `count` results of a row, from the i-th on: fewer than kLanes.
template <int kOperand, int kKind>
void activate_rest(const Activate &a, int64_t row, int64_t i, int64_t count) {
  const ms_activation &kind = *a.activation;
  const float *gate = a.gate + row * a.stride;
  f32x16 g, u{};
  if (kind.gated && kind.interleaved) {
    const int64_t first = count * 2 < kLanes ? count * 2 : kLanes, second = count * 2 - first;
    f32x16 both[2] = {finished(load_as(MS_FP32, gate, 2 * i, first), a.gate_outer, a.gate_bias, 2 * i, first)};
    if (second)
      both[1] =
          finished(load_as(MS_FP32, gate, 2 * i + kLanes, second), a.gate_outer, a.gate_bias, 2 * i + kLanes, second);
    g = every_second<0>(both[0], both[1]);
    u = every_second<1>(both[0], both[1]);
  } else {
    g = finished(load_as(MS_FP32, gate, i, count), a.gate_outer, a.gate_bias, i, count);
    if (kind.gated) u = finished(load_as(MS_FP32, a.up + row * a.stride, i, count), a.up_outer, a.up_bias, i, count);
  }
  store_operand<kOperand>(a.out[row], i, activated<kKind>(g, u, kind), count);
}

template <int kOperand, int kKind, int R>
MS_INLINE void activate_some(const Activate &a, int64_t row) {
  int64_t i = 0;
  for (; i + kRegisterLanes <= a.n; i += kRegisterLanes) activate_whole<kOperand, kKind, R>(a, row, i);
  if (i < a.n)
    for (int r = 0; r < R; ++r) activate_rest<kOperand, kKind>(a, row + r, i, a.n - i);
}
// One kind at a time, so that its constants stay in registers.
template <int kOperand, int kKind>
void activate_rows(const Activate *a) {
  int64_t row = 0;
  for (; row + kSideBySide <= a->m; row += kSideBySide) activate_some<kOperand, kKind, kSideBySide>(*a, row);
  for (; row < a->m; ++row) activate_some<kOperand, kKind, 1>(*a, row);
}
template <int kOperand>
void activate_rows(const Activate *a);

// At most 32 results a row, which share a scale: in float32 first, and as an MX format stores them then.
template <int kOperand>
void activate_stored(const Activate &a) {
  const Grid &grid = kGrids[a.activation->stored - 1];
  ms_activation plain = *a.activation;
  plain.stored = 0;
  for (int64_t row = 0; row < a.m; row += kSideBySide) {
    float wide[kSideBySide][2 * kLanes] = {};
    void *out[kSideBySide];
    for (int r = 0; r < kSideBySide; ++r) out[r] = wide[r];
    Activate some = a;
    some.activation = &plain;
    some.gate += row * a.stride;
    if (a.up) some.up += row * a.stride;
    some.m = a.m - row < kSideBySide ? a.m - row : kSideBySide;
    some.out = out;
    activate_rows<MS_FP32>(&some);
    for (int64_t r = 0; r < some.m; ++r) {
      f32x16 v[2] = {load_lanes<f32x16>(wide[r]), load_lanes<f32x16>(wide[r] + kLanes)};
      as_stored(v, grid);
      for (int64_t i = 0; i < a.n; i += kLanes)
        store_operand<kOperand>(a.out[row + r], i, v[i / kLanes], lanes_left(a.n, i));
    }
  }
}

template <int kOperand>
void activate_rows(const Activate *a) {
  if (a->activation->stored) return activate_stored<kOperand>(*a);
  switch (a->activation->kind) {
    case MS_SILU: return activate_rows<kOperand, MS_SILU>(a);
    case MS_SWIGLU_OAI: return activate_rows<kOperand, MS_SWIGLU_OAI>(a);
    case MS_SWIGLU_STEP: return activate_rows<kOperand, MS_SWIGLU_STEP>(a);
    case MS_SITU: return activate_rows<kOperand, MS_SITU>(a);
    case MS_GELU: return activate_rows<kOperand, MS_GELU>(a);
    case MS_GELU_TANH: return activate_rows<kOperand, MS_GELU_TANH>(a);
    default: return activate_rows<kOperand, MS_RELU2>(a);
  }
}

}  // namespace
}  // namespace microscale
