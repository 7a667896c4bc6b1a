// ms_token's own steps at every level of this machine: those with one product are held to that call's bits, the others
// to double precision, in memory that has not a byte more than what was given.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "microscale.h"
#include "numbers.h"

namespace {

ms_step step_of(int kind) {
  ms_step step{};
  step.kind = kind;
  return step;
}

// To the nearest number of `dtype`, as a float.
double nearest(int dtype, double v) {
  Numbers one(1, dtype, 0);
  if (dtype == MS_BF16) {
    const uint16_t half = half_of(static_cast<float>(v), dtype);
    return double(float_of(half, dtype));
  }
  return double(static_cast<float>(v));
}

void test_route(int level, int dtype, int64_t experts, int64_t chosen) {
  const int64_t m = 3;
  const Numbers logits(m * experts, dtype);  // of 255 values: of many experts, some are equal
  for (int how = 0; how < 4; ++how) {
    const int to = how == 3 ? int(MS_FP32) : dtype;
    const int router = how == 0 ? MS_TOPK_SOFTMAX : MS_SOFTMAX_TOPK;
    std::vector<int64_t> ids(static_cast<size_t>(m * chosen), -7);
    std::vector<float> weights(ids.size(), std::nanf(""));
    CHECK(ms_route(level, dtype, logits.data, m, experts, router, how % 2 == 1, to, chosen, ids.data(),
                   weights.data()) == MS_OK);
    int wrong = 0;
    for (int64_t i = 0; i < m; ++i) {
      std::vector<int64_t> order(static_cast<size_t>(experts));
      for (int64_t e = 0; e < experts; ++e) order[static_cast<size_t>(e)] = e;
      const auto logit = [&](int64_t e) { return logits.at(i * experts + e); };
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logit(a) > logit(b); });
      double whole = 0;
      const int64_t counted = how == 2 ? experts : chosen;
      for (int64_t j = 0; j < counted; ++j) whole += std::exp(logit(order[static_cast<size_t>(j)]));
      for (int64_t j = 0; j < chosen; ++j) {
        const auto at = static_cast<size_t>(i * chosen + j);
        const double wanted = std::exp(logit(order[static_cast<size_t>(j)])) / whole;
        wrong += ids[at] != order[static_cast<size_t>(j)];
        wrong += !(std::abs(double(weights[at]) - wanted) <=
                   rounded(to, wanted) + double(counted + 8) * std::ldexp(1.0, -23) * wanted);
      }
    }
    CHECK_IN(wrong == 0, "level %d dtype %d: %ld of %ld, way %d: %d wrong", level, dtype, long(chosen), long(experts),
             how, wrong);
  }
}

void test_not_a_number(int level) {
  std::vector<float> logits = {1, std::nanf(""), 3, std::nanf("")}, weights(3);
  std::vector<int64_t> ids(3);
  CHECK(ms_route(level, MS_FP32, logits.data(), 1, 4, MS_TOPK_SOFTMAX, 1, MS_FP32, 3, ids.data(), weights.data()) ==
        MS_OK);
  CHECK(ids[0] == 1 && ids[1] == 3 && ids[2] == 2 && std::isnan(weights[0]));
}

void test_norm(int level, int dtype, int64_t n, bool added, bool twice) {
  const int64_t m = 2;
  Numbers x(m * n, dtype), y(m * n, dtype);
  const Numbers before(x), more(m * n, dtype, 3), w(n, MS_BF16);
  y.poison();
  ms_step step = step_of(MS_STEP_NORM);
  auto &s = step.of.norm;
  s.x = x.data, s.more = added ? more.data : nullptr, s.weight_dtype = MS_BF16, s.twice = twice, s.w = w.data;
  s.n = n, s.epsilon = 0.01f, s.y = y.data;
  CHECK(ms_token(level, dtype, m, &step, 1, 0, 2, nullptr) == MS_OK);
  int wrong = 0;
  for (int64_t i = 0; i < m; ++i) {
    double squares = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double sum = before.at(i * n + j) + (added ? more.at(i * n + j) : 0);
      wrong += !(std::abs(x.at(i * n + j) - sum) <= (added ? rounded(dtype, sum) : 0));
      squares += x.at(i * n + j) * x.at(i * n + j);
    }
    for (int64_t j = 0; j < n; ++j) {
      const double wanted = w.at(j) * x.at(i * n + j) / std::sqrt(squares / double(n) + double(0.01f));
      const double bound =
          (twice ? 2.1 : 1) * rounded(dtype, wanted) + double(n + 8) * std::ldexp(1.0, -24) * std::abs(wanted);
      wrong += !(std::abs(y.at(i * n + j) - wanted) <= bound);
    }
  }
  CHECK_IN(wrong == 0, "level %d dtype %d norm of %ld, added %d, twice %d: %d wrong", level, dtype, long(n), added,
           twice, wrong);
}

void test_dense(int level, int dtype) {
  const int64_t m = 2, k = 70, n[MS_STEP_PARTS] = {37, 5, 300}, all = 342;
  const Numbers x(m * k, dtype);
  Numbers y(m * all, dtype);
  y.poison();
  std::vector<Numbers> w, bias;
  for (int64_t part : n) w.emplace_back(part * k, dtype), bias.emplace_back(part, dtype);
  ms_step step = step_of(MS_STEP_DENSE);
  auto &s = step.of.dense;
  s.weight_dtype = dtype, s.parts = MS_STEP_PARTS, s.k = k, s.x = x.data, s.y = y.data;
  for (size_t i = 0; i < MS_STEP_PARTS; ++i)
    s.w[i] = w[i].data, s.w_stride[i] = k, s.n[i] = n[i], s.bias[i] = i == 1 ? nullptr : bias[i].data;
  CHECK(ms_token(level, dtype, m, &step, 1, 0, 2, nullptr) == MS_OK);
  int64_t before = 0;
  for (size_t i = 0; i < MS_STEP_PARTS; before += n[i++]) {
    Numbers one(m * n[i], dtype);
    CHECK(ms_dense(level, dtype, w[i].data, k, n[i], k, s.bias[i], dtype, x.data, k, m, one.data, 1) == MS_OK);
    for (int64_t row = 0; row < m; ++row)
      CHECK(std::memcmp(one.data + row * n[i] * one.size, y.data + (row * all + before) * y.size,
                        static_cast<size_t>(n[i] * y.size)) == 0);
  }
}

// Tokens one after another through a ring of `slots`, against ms_attend on keys that are turned here.
void test_attend(int level, int dtype, int64_t width, int64_t turned, int64_t slots, bool normed, bool sunk) {
  const int64_t m = 2, heads = 6, key_heads = 2, tokens = slots + 3, half = turned / 2;
  const int64_t stride = (heads + 2 * key_heads) * width, size = dtype == MS_FP32 ? 4 : 2;
  const Numbers cos(tokens * half, dtype), sin(tokens * half, dtype), q_norm(width, MS_BF16), k_norm(width, MS_BF16),
      sinks(heads, dtype);
  Numbers keys(m * key_heads * slots * width, dtype), values(m * key_heads * slots * width, dtype);
  keys.poison(), values.poison();
  Numbers wanted_keys(keys), wanted_values(values);
  for (int64_t position = 0; position < tokens; ++position) {
    const Numbers qkv(m * stride, dtype);
    Numbers y(m * heads * width, dtype), wanted(m * heads * width, dtype), queries(m * heads * width, dtype, 0);
    y.poison();
    ms_step step = step_of(MS_STEP_ATTEND);
    auto &s = step.of.attend;
    s.heads = heads, s.key_heads = key_heads, s.width = width, s.turned = turned, s.slots = slots;
    s.positions = tokens, s.q_stride = s.k_stride = s.v_stride = stride;
    s.q = qkv.data, s.k = qkv.data + heads * width * size, s.v = qkv.data + (heads + key_heads) * width * size;
    s.weight_dtype = MS_BF16, s.twice = 1, s.epsilon = 0.01f, s.scale = 0.5f;
    if (normed) s.q_norm = q_norm.data, s.k_norm = k_norm.data;
    s.cos = cos.data, s.sin = sin.data, s.keys = keys.data, s.values = values.data;
    s.sinks = sunk ? sinks.data : nullptr, s.y = y.data;
    CHECK(ms_token(level, dtype, m, &step, 1, position, 2, nullptr) == MS_OK);

    int wrong = 0;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t h = 0; h < heads + key_heads; ++h) {
        Numbers head(width, dtype, 0);
        std::memcpy(head.data, qkv.data + (i * stride + h * width) * size, static_cast<size_t>(width * size));
        if (normed) {
          ms_step norm = step_of(MS_STEP_NORM);
          auto &p = norm.of.norm;
          Numbers in(head);
          p.x = in.data, p.weight_dtype = MS_BF16, p.twice = 1, p.n = width, p.epsilon = 0.01f, p.y = head.data;
          p.w = h < heads ? q_norm.data : k_norm.data;
          CHECK(ms_token(level, dtype, 1, &norm, 1, 0, 1, nullptr) == MS_OK);
        }
        const int64_t slot = ((i * key_heads + h - heads) * slots + position % slots) * width;
        Numbers &to = h < heads ? queries : wanted_keys;
        const int64_t from = h < heads ? (i * heads + h) * width : slot;
        for (int64_t d = 0; d < width; ++d) {
          const double c = d < turned ? cos.at(position * half + d % half) : 1,
                       sn = d < turned ? sin.at(position * half + d % half) : 0;
          const double other = d >= turned ? 0 : d < half ? -head.at(d + half) : head.at(d - half);
          const double sum = nearest(dtype, head.at(d) * c) + nearest(dtype, other * sn);
          const double found = h < heads ? sum : keys.at(slot + d);
          // fp16 here is not rounded between, and float32 not at all: a few units of what is added.
          wrong += !(std::abs(found - sum) <=
                     rounded(dtype, sum) + 2 * rounded(dtype, std::abs(head.at(d) * c) + std::abs(other * sn)));
          to.set(from + d, static_cast<float>(h < heads ? sum : found));
        }
        if (h >= heads)
          std::memcpy(wanted_values.data + slot * size, qkv.data + (i * stride + (h + key_heads) * width) * size,
                      static_cast<size_t>(width * size));
      }
    CHECK_IN(wrong == 0, "level %d dtype %d width %ld turned %ld: %d keys wrong", level, dtype, long(width),
             long(turned), wrong);
    CHECK(std::memcmp(values.data, wanted_values.data, static_cast<size_t>(m * key_heads * slots * width * size)) == 0);
    if (dtype != MS_BF16) continue;  // where queries are rounded as here, to the bit
    ms_attention a{};
    a.dtype = dtype, a.scale = 0.5f, a.batch = m, a.heads = heads, a.key_heads = key_heads, a.queries = 1;
    a.tokens = std::min(position + 1, slots), a.width = a.value_width = width;
    a.q = queries.data, a.k = keys.data, a.v = values.data, a.y = wanted.data;
    a.sinks = s.sinks;
    a.q_strides[0] = heads * width, a.q_strides[1] = width;
    a.k_strides[0] = a.v_strides[0] = key_heads * slots * width, a.k_strides[1] = a.v_strides[1] = slots * width;
    a.k_strides[2] = a.v_strides[2] = width;
    CHECK(ms_attend(level, &a, 1) == MS_OK);
    CHECK(std::memcmp(wanted.data, y.data, static_cast<size_t>(m * heads * width * size)) == 0);
  }
}

void test_gate(int level, int dtype, int64_t n) {
  const int64_t m = 2, stride = 2 * n + 1;
  const Numbers x(m * stride, dtype);
  Numbers y(m * n, dtype);
  y.poison();
  ms_step step = step_of(MS_STEP_GATE);
  auto &s = step.of.gate;
  s.activation.kind = MS_SILU, s.activation.limit = INFINITY, s.n = n, s.stride = stride;
  s.gate = x.data, s.up = x.data + n * x.size, s.y = y.data;
  CHECK(ms_token(level, dtype, m, &step, 1, 0, 1, nullptr) == MS_OK);
  int wrong = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double g = x.at(i * stride + j), wanted = g / (1 + std::exp(-g)) * x.at(i * stride + n + j);
      wrong += !(std::abs(y.at(i * n + j) - wanted) <=
                 2.1 * rounded(dtype, wanted) + 8 * std::ldexp(1.0, -24) * std::abs(wanted));
    }
  CHECK_IN(wrong == 0, "level %d dtype %d gate of %ld: %d wrong", level, dtype, long(n), wrong);
  s.activation.kind = MS_SWIGLU_OAI;
  CHECK(ms_token(level, dtype, m, &step, 1, 0, 1, nullptr) == MS_BAD_ARGUMENT);
}

void test_embed_and_refusals() {
  const int64_t ids[2] = {2, 0};
  const Numbers table(3 * 5, MS_BF16);
  Numbers y(2 * 5, MS_BF16);
  ms_step step = step_of(MS_STEP_EMBED);
  step.of.embed.table = table.data, step.of.embed.count = 3, step.of.embed.n = 5, step.of.embed.ids = ids;
  step.of.embed.y = y.data;
  double seconds[MS_STEP_KINDS] = {};
  CHECK(ms_token(0, MS_BF16, 2, &step, 1, 0, 1, seconds) == MS_OK);
  CHECK(std::memcmp(y.data, table.data + 20, 10) == 0 && std::memcmp(y.data + 10, table.data, 10) == 0);
  CHECK(seconds[MS_STEP_EMBED] > 0 && seconds[MS_STEP_MOE] == 0);
  step.of.embed.count = 2;
  CHECK(ms_token(0, MS_BF16, 2, &step, 1, 0, 1, nullptr) == MS_BAD_ARGUMENT);
  CHECK(ms_token(MS_LEVELS, MS_BF16, 2, &step, 0, 0, 1, nullptr) == MS_BAD_LEVEL);
  CHECK(ms_token(0, MS_BF16, 2, &step, 0, -1, 1, nullptr) == MS_BAD_ARGUMENT);
  CHECK(ms_token(0, MS_DTYPES, 2, &step, 0, 0, 1, nullptr) == MS_BAD_ARGUMENT);
  step.kind = MS_STEP_KINDS;
  CHECK(ms_token(0, MS_BF16, 2, &step, 1, 0, 1, nullptr) == MS_BAD_ARGUMENT);
  step.kind = MS_STEP_ATTEND;
  CHECK(ms_token(0, MS_BF16, 2, &step, 1, 0, 1, nullptr) == MS_BAD_ARGUMENT);
  float logits[2] = {}, weights[2];
  int64_t chosen[2];
  CHECK(ms_route(0, MS_FP32, logits, 1, 2, MS_TOPK_SOFTMAX, 1, MS_FP32, 3, chosen, weights) == MS_BAD_ARGUMENT);
  CHECK(ms_route(0, MS_FP32, logits, 1, 2, MS_ROUTERS, 1, MS_FP32, 1, chosen, weights) == MS_BAD_ARGUMENT);
  CHECK(ms_route(0, MS_FP32, logits, 1, 2, MS_TOPK_SOFTMAX, 1, MS_DTYPES, 1, chosen, weights) == MS_BAD_ARGUMENT);
}

}  // namespace

int main() {
  for (int level = 0; level <= ms_level(); ++level)
    for (int dtype : {MS_BF16, MS_FP16, MS_FP32}) {
      test_route(level, dtype, 4, 2);
      test_route(level, dtype, 33, 33);
      test_route(level, dtype, 300, 8);
      for (int how = 0; how < 4; ++how)
        for (int64_t n : {1, 16, 33, 2880}) test_norm(level, dtype, n, how & 1, how & 2);
      test_dense(level, dtype);
      test_attend(level, dtype, 16, 16, 5, false, true);
      test_attend(level, dtype, 33, 20, 4, true, false);
      test_attend(level, dtype, 64, 64, 40, true, true);
      for (int64_t n : {0, 1, 17, 64}) test_gate(level, dtype, n);
    }
  for (int level = 0; level <= ms_level(); ++level) test_not_a_number(level);
  test_embed_and_refusals();
  return check::finish("test_token");
}
