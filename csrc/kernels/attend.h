// Softmax attention in float32: logits of all tokens, then their exponentials, then the weighted sum of the values.
#pragma once
#include "attend_table.h"
#include "rows.h"

namespace microscale {
namespace {

// Numbers in the level's registers: the compiler keeps wider vectors in memory. Each unit says its own.
constexpr int kWidth = MICROSCALE_WIDTH;
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

constexpr int kTokens = kWidth == 16 ? 4 : 2;  // whose logits are added up together
constexpr int kWide = kWidth == 16 ? 4 : 2;    // vectors of values that are summed together

template <int kDtype>
inline Floats floats_at(const uint8_t *p) {
  if constexpr (kDtype == MS_FP32) return load_lanes<Floats>(p);
  const Words bits = __builtin_convertvector(load_lanes<Halves>(p), Words);
  if constexpr (kDtype == MS_BF16) return __builtin_bit_cast(Floats, bits << 16);
  const Words magnitude = (bits & 0x7fffu) << 13;  // as from_fp16
  const Words value = __builtin_bit_cast(Words, __builtin_bit_cast(Floats, magnitude) * 0x1p112f);
  const Words large = magnitude >= (0x7c00u << 13);
  const Words finished = (value & ~large) | ((magnitude | 0x7f800000u) & large);
  return __builtin_bit_cast(Floats, finished | (bits & 0x8000u) << 16);
}

// Numbers i and following of those at `p`, of which there are n; zeros behind them.
template <int kDtype>
inline Floats floats_of(const uint8_t *p, int64_t i, int64_t n) {
  constexpr int64_t kBytes = kDtype == MS_FP32 ? 4 : 2;
  if (n - i >= kWidth) return floats_at<kDtype>(p + i * kBytes);
  uint8_t part[4 * kWidth] = {};
  __builtin_memcpy(part, p + i * kBytes, static_cast<size_t>((n - i) * kBytes));
  return floats_at<kDtype>(part);
}

inline float sum_of(Floats v) {
  float halves[kWidth];
  store_lanes(halves, v);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) halves[i] += halves[i + step];
  return halves[0];
}

// The sums of 16 vectors of 16, in their order.
inline f32x16 sums_of(const f32x16 *v) {
  f32x16 eight[8], four[4], two[2];
  for (int i = 0; i < 8; ++i) {
    const f32x16 a = v[2 * i], b = v[2 * i + 1];
    eight[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const f32x16 a = eight[2 * i], b = eight[2 * i + 1];
    four[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const f32x16 a = four[2 * i], b = four[2 * i + 1];
    two[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
             __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  return __builtin_shufflevector(two[0], two[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(two[0], two[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

inline float largest_of(f32x16 v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// q . k of kTokens tokens from `token` on with kQueries heads' scaled queries, to logits[head][token].
template <int kDtype>
inline void logits_of(const Attend &a, const float *queries, int64_t token, float *logits, int64_t stride) {
  Floats products[kQueries * kTokens] = {};  // [head][token]
  const int64_t padded = (a.width + 15) / 16 * 16;
  for (int64_t i = 0; i < a.width; i += kWidth) {
    Floats k[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = token + t < a.tokens ? token + t : a.tokens - 1;
      k[t] = floats_of<kDtype>(a.k + at * a.k_step, i, a.width);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kQueries; ++h) {
      const Floats q = load_lanes<Floats>(queries + h * padded + i);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) products[h * kTokens + t] += q * k[t];
    }
  }
  if (kWidth == 16) {
    const f32x16 sums = sums_of(reinterpret_cast<const f32x16 *>(products));
    for (int h = 0; h < kQueries; ++h)
      for (int t = 0; t < kTokens; ++t) logits[h * stride + token + t] = sums[h * kTokens + t];
  } else {
    for (int h = 0; h < kQueries; ++h)
      for (int t = 0; t < kTokens; ++t) logits[h * stride + token + t] = sum_of(products[h * kTokens + t]);
  }
}

// Logits to weights that sum to 1, less the sink's; all 0 where every token is masked and there is no sink.
inline void softmax(const Attend &a, float *logits, int64_t padded, int64_t head) {
  constexpr float kNever = -__builtin_inff();
  float most = kNever, sink = kNever;
  if (a.sinks) most = sink = load_as(a.dtype, a.sinks, head, 1)[0];
  for (int64_t t = 0; t < padded; ++t)
    if (t >= a.tokens || (a.mask && a.mask[t] == 0)) logits[t] = kNever;
  f32x16 high = splat(most);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const f32x16 v = load_lanes<f32x16>(logits + t);
    high = v > high ? v : high;
  }
  most = largest_of(high);
  const float from = most == kNever ? 0.0f : most;
  f32x16 sum{};
  for (int64_t t = 0; t < padded; t += kLanes) {
    const f32x16 v = load_lanes<f32x16>(logits + t);
    const f32x16 weight = v == kNever ? f32x16{} : exponential(v - from);
    store_lanes(logits + t, weight);
    sum += weight;
  }
  float whole = 0;
  for (int i = 0; i < kLanes; ++i) whole += sum[i];
  if (a.sinks) whole += exponential(splat(sink - from))[0];
  const float share = whole > 0 || whole != whole ? 1 / whole : 0;
  for (int64_t t = 0; t < padded; t += kLanes) store_lanes(logits + t, load_lanes<f32x16>(logits + t) * share);
}

template <int kDtype>
void attend_as(const Attend &a) {
  const int64_t padded = (a.tokens + 15) / 16 * 16, width = (a.width + 15) / 16 * 16;
  float *logits = a.scratch, *queries = a.scratch + kQueries * padded;
  for (int64_t h = 0; h < kQueries; ++h)
    for (int64_t i = 0; i < width; i += kLanes) {
      f32x16 v{};
      if (h < a.heads && i < a.width) v = load_as(kDtype, a.q + h * a.q_step, i, lanes_left(a.width, i)) * a.scale;
      store_lanes(queries + h * width + i, v);
    }
  for (int64_t t = 0; t < a.tokens; t += kTokens) logits_of<kDtype>(a, queries, t, logits, padded);
  for (int64_t h = 0; h < a.heads; ++h) softmax(a, logits + h * padded, padded, h);
  for (int64_t h = a.heads; h < kQueries; ++h)
    for (int64_t t = 0; t < padded; ++t) logits[h * padded + t] = 0;
  for (int64_t first = 0; first < a.value_width; first += kWide * kWidth) {
    Floats sums[kQueries][kWide] = {};
    for (int64_t t = 0; t < a.tokens; ++t) {
      const uint8_t *row = a.v + t * a.v_step;
#pragma GCC unroll 4
      for (int c = 0; c < kWide; ++c) {
        const int64_t i = first + c * kWidth;
        const Floats v = i < a.value_width ? floats_of<kDtype>(row, i, a.value_width) : Floats{};
#pragma GCC unroll 4
        for (int h = 0; h < kQueries; ++h) sums[h][c] += v * logits[h * padded + t];
      }
    }
    for (int64_t h = 0; h < a.heads; ++h) {
      float row[kWide * kWidth];
      for (int c = 0; c < kWide; ++c) store_lanes(row + c * kWidth, sums[h][c]);
      const int64_t left = a.value_width - first, count = left < kWide * kWidth ? left : kWide * kWidth;
      uint8_t *y = a.y + (h * a.value_width + first) * (kDtype == MS_FP32 ? 4 : 2);
      for (int64_t i = 0; i < count; i += kLanes)
        store_as(kDtype, y, i, load_as(MS_FP32, row, i, lanes_left(count, i)), lanes_left(count, i));
    }
  }
}

void attend(const Attend *a) {
  switch (a->dtype) {
    case MS_BF16: attend_as<MS_BF16>(*a); break;
    case MS_FP16: attend_as<MS_FP16>(*a); break;
    default: attend_as<MS_FP32>(*a);
  }
}

}  // namespace
}  // namespace microscale
