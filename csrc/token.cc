// A token through a model: the core's calls one after another, and what lies between them.
#include <chrono>
#include <cstring>

#include "buffer.h"
#include "dense.h"
#include "floats.h"
#include "operands.h"
#include "small.h"

namespace microscale {

const Small *small_for(int level) {
  if (level < 0 || level > ms_level()) return nullptr;
#ifdef MICROSCALE_HAVE_AVX512
  if (level >= MS_AVX512) return &avx512_small;
#endif
#ifdef MICROSCALE_HAVE_AVX2
  if (level >= MS_AVX2) return &avx2_small;
#endif
  return &plain_small;
}

namespace {

const uint8_t *at(const void *p, int64_t bytes) { return static_cast<const uint8_t *>(p) + bytes; }
uint8_t *at(void *p, int64_t bytes) { return static_cast<uint8_t *>(p) + bytes; }

struct Token {
  const Small *small;
  int level, dtype;
  int64_t m, position;
  int threads;

  int64_t bytes(int64_t numbers) const { return numbers * element_bytes(dtype); }

  int embed(const ms_step &step) const {
    const auto &s = step.of.embed;
    for (int64_t i = 0; i < m; ++i) {
      if (s.ids[i] < 0 || s.ids[i] >= s.count) return MS_BAD_ARGUMENT;
      std::memcpy(at(s.y, i * bytes(s.n)), at(s.table, s.ids[i] * bytes(s.n)), static_cast<size_t>(bytes(s.n)));
    }
    return MS_OK;
  }

  int norm(const ms_step &step) const {
    const auto &s = step.of.norm;
    if (s.n < 1 || s.weight_dtype < 0 || s.weight_dtype >= MS_DTYPES) return MS_BAD_ARGUMENT;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = i * bytes(s.n);
      void *x = at(s.x, row);
      const SmallNorm p{
          dtype, x, s.more ? at(s.more, row) : nullptr, x, s.weight_dtype, s.w, s.n, s.epsilon, s.twice, at(s.y, row)};
      small->norm(&p);
    }
    return MS_OK;
  }

  int dense(const ms_step &step) const {
    const auto &s = step.of.dense;
    if (s.parts < 0 || s.parts > MS_STEP_PARTS) return MS_BAD_ARGUMENT;
    DensePart parts[MS_STEP_PARTS];
    for (int i = 0; i < s.parts; ++i) parts[i] = {s.w[i], s.w_stride[i], s.n[i], s.bias[i]};
    return dense_parts(level, s.weight_dtype, parts, s.parts, s.k, dtype, s.x, s.k, m, s.y, threads);
  }

  int linear(const ms_step &step) const {
    const auto &s = step.of.linear;
    return ms_linear(level, s.w, s.outer, dtype, s.x, s.k, nullptr, m, s.bias, s.y, threads);
  }

  // `heads` heads from x, normed and turned, to y, `y_step` bytes from one to the next.
  template <class Attend>
  void turn(const Attend &s, const uint8_t *x, int64_t heads, const void *weight, uint8_t *y, int64_t y_step) const {
    const int64_t half = s.turned / 2, row = position * bytes(half);
    for (int64_t h = 0; h < heads; ++h, x += bytes(s.width), y += y_step) {
      if (weight) {
        const SmallNorm p{dtype, x, nullptr, nullptr, s.weight_dtype, weight, s.width, s.epsilon, s.twice, y};
        small->norm(&p);
      } else {
        std::memcpy(y, x, static_cast<size_t>(bytes(s.width)));
      }
      small->turn(dtype, y, half, at(s.cos, row), at(s.sin, row), y);
    }
  }

  int attend(const ms_step &step) const {
    const auto &s = step.of.attend;
    if (s.heads < 1 || s.key_heads < 1 || s.width < 1 || s.turned < 0 || s.turned > s.width || s.turned % 2 ||
        s.slots < 1 || position >= s.positions || s.weight_dtype < 0 || s.weight_dtype >= MS_DTYPES)
      return MS_BAD_ARGUMENT;
    const int64_t head = bytes(s.width), one = s.slots * head, slot = position % s.slots * head;
    Buffer<uint8_t> queries(m * s.heads * head);
    if (!queries) return MS_NO_MEMORY;
    for (int64_t i = 0; i < m; ++i) {
      uint8_t *keys = at(s.keys, i * s.key_heads * one + slot), *values = at(s.values, i * s.key_heads * one + slot);
      turn(s, at(s.q, i * bytes(s.q_stride)), s.heads, s.q_norm, queries.get() + i * s.heads * head, head);
      turn(s, at(s.k, i * bytes(s.k_stride)), s.key_heads, s.k_norm, keys, one);
      const uint8_t *v = at(s.v, i * bytes(s.v_stride));
      for (int64_t h = 0; h < s.key_heads; ++h) std::memcpy(values + h * one, v + h * head, static_cast<size_t>(head));
    }
    ms_attention a{};
    a.dtype = dtype, a.scale = s.scale;
    a.batch = m, a.heads = s.heads, a.key_heads = s.key_heads, a.queries = 1;
    a.tokens = position < s.slots ? position + 1 : s.slots;  // of a ring that has gone round: all, in any order
    a.width = a.value_width = s.width;
    a.q = queries.get(), a.k = s.keys, a.v = s.values;
    a.q_strides[0] = s.heads * s.width, a.q_strides[1] = s.width;
    a.k_strides[0] = a.v_strides[0] = s.key_heads * s.slots * s.width;
    a.k_strides[1] = a.v_strides[1] = s.slots * s.width;
    a.k_strides[2] = a.v_strides[2] = s.width;
    a.sinks = s.sinks, a.y = s.y;
    return ms_attend(level, &a, threads);
  }

  int gate(const ms_step &step) const {
    const auto &s = step.of.gate;
    const int kind = s.activation.kind;
    if (s.n < 0 || (kind != MS_SILU && kind != MS_GELU && kind != MS_GELU_TANH && kind != MS_RELU2))
      return MS_BAD_ARGUMENT;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = i * bytes(s.stride);
      small->gate(dtype, &s.activation, at(s.gate, row), at(s.up, row), s.n, at(s.y, i * bytes(s.n)));
    }
    return MS_OK;
  }

  int route(const ms_step &step) const {
    const auto &s = step.of.route;
    return ms_route(level, dtype, s.logits, m, s.experts, s.router, s.renormalize, s.rounded, s.chosen, s.ids,
                    s.weights);
  }

  int moe(const ms_step &step) const {
    const auto &s = step.of.moe;
    return ms_moe(level, s.w13, s.outer13, s.w2, s.outer2, dtype, s.x, nullptr, m, s.ids, s.weights, s.chosen,
                  &s.activation, s.b13, s.b2, 0, s.y, threads);
  }

  int run(const ms_step &step) const {
    switch (step.kind) {
      case MS_STEP_EMBED: return embed(step);
      case MS_STEP_NORM: return norm(step);
      case MS_STEP_DENSE: return dense(step);
      case MS_STEP_LINEAR: return linear(step);
      case MS_STEP_ATTEND: return attend(step);
      case MS_STEP_GATE: return gate(step);
      case MS_STEP_ROUTE: return route(step);
      case MS_STEP_MOE: return moe(step);
      default: return MS_BAD_ARGUMENT;
    }
  }
};

}  // namespace
}  // namespace microscale

extern "C" int ms_token(int level, int dtype, int64_t m, const struct ms_step *steps, int64_t count, int64_t position,
                        int threads, double *seconds) {
  using namespace microscale;
  const StandardFloats floats;
  if (dtype < 0 || dtype >= MS_DTYPES || m < 0 || count < 0 || position < 0 || threads < 1) return MS_BAD_ARGUMENT;
  const Token token{small_for(level), level, dtype, m, position, threads};
  if (!token.small) return MS_BAD_LEVEL;
  using Clock = std::chrono::steady_clock;
  Clock::time_point before = Clock::now();
  for (int64_t i = 0; i < count; ++i) {
    if (const int status = token.run(steps[i]); status != MS_OK) return status;
    if (!seconds) continue;
    const Clock::time_point now = Clock::now();
    seconds[steps[i].kind] += std::chrono::duration<double>(now - before).count();
    before = now;
  }
  return MS_OK;
}
