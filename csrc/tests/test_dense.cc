// ms_dense, ms_attend and ms_rms_norm at every level of this machine against double precision on the same numbers, at
// addresses that nothing aligns, under sanitizers that see every byte read or written outside of what was given.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "microscale.h"
#include "numbers.h"

namespace {

struct Case {
  int64_t m, n, k;
  int64_t more;  // numbers between the end of a row and the next
};

void test_dense(int level, int weights, int dtype, const Case &c) {
  const int64_t w_stride = c.k + c.more, x_stride = c.k + 2 * c.more;
  Numbers w(c.n * w_stride - (c.n ? c.more : 0), weights), x(c.m * x_stride - (c.m ? 2 * c.more : 0), dtype);
  const Numbers bias(c.n, weights, 3);
  for (int64_t row = 0; row + 1 < c.n; ++row)
    for (int64_t i = c.k; i < w_stride; ++i) w.set(row * w_stride + i, weights == MS_FP16 ? 0 : std::nanf(""));
  Numbers y(c.m * c.n, dtype);
  y.poison();
  CHECK(ms_dense(level, weights, w.data, w_stride, c.n, c.k, bias.data, dtype, x.data, x_stride, c.m, y.data, 2) ==
        MS_OK);
  int wrong = 0;
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = bias.at(j), magnitude = std::abs(sum);
      for (int64_t k = 0; k < c.k; ++k) {
        const double product = x.at(i * x_stride + k) * w.at(j * w_stride + k);
        sum += product, magnitude += std::abs(product);
      }
      const double bound = double(c.k + 2) * std::ldexp(1.0, -24) * magnitude + rounded(dtype, sum);
      wrong += !(std::abs(y.at(i * c.n + j) - sum) <= bound);
    }
  CHECK_IN(wrong == 0, "level %d weights %d dtype %d [%ld, %ld, %ld]: %d wrong", level, weights, dtype, long(c.m),
           long(c.n), long(c.k), wrong);
  for (int64_t i = 0; i < c.m; i += c.m > 3 ? c.m / 3 : 1) {  // a row alone, on one thread, without the bias' help
    Numbers one(c.n, dtype);
    one.poison();
    CHECK(ms_dense(level, weights, w.data, w_stride, c.n, c.k, bias.data, dtype, x.data + i * x_stride * x.size,
                   x_stride, 1, one.data, 1) == MS_OK);
    CHECK_IN(std::memcmp(one.data, y.data + i * c.n * y.size, static_cast<size_t>(c.n * y.size)) == 0,
             "level %d weights %d dtype %d row %ld of %ld differs alone", level, weights, dtype, long(i), long(c.m));
  }
}

void test_attend(int level, int dtype, int64_t batch, int64_t heads, int64_t key_heads, int64_t queries, int64_t tokens,
                 int64_t width, int64_t value_width, bool masked, bool sunk) {
  // q as a transposed view, k and v with room behind each token.
  const Numbers q(batch * queries * heads * width, dtype), k(batch * key_heads * tokens * (width + 3), dtype),
      v(batch * key_heads * tokens * (value_width + 1), dtype), sinks(heads, dtype);
  std::vector<uint8_t> mask(static_cast<size_t>(batch * queries * tokens));
  for (uint8_t &byte : mask) byte = generator() % 3 != 0;
  if (masked && !mask.empty())
    std::memset(mask.data(), 0, static_cast<size_t>(tokens));  // the first query sees nothing
  Numbers y(batch * queries * heads * value_width, dtype);
  y.poison();
  ms_attention a{};
  a.dtype = dtype, a.scale = 0.5f;
  a.batch = batch, a.heads = heads, a.key_heads = key_heads, a.queries = queries, a.tokens = tokens;
  a.width = width, a.value_width = value_width;
  a.q = q.data, a.k = k.data, a.v = v.data, a.y = y.data;
  a.q_strides[0] = queries * heads * width, a.q_strides[1] = width, a.q_strides[2] = heads * width;
  a.k_strides[0] = key_heads * tokens * (width + 3), a.k_strides[1] = tokens * (width + 3), a.k_strides[2] = width + 3;
  a.v_strides[0] = key_heads * tokens * (value_width + 1), a.v_strides[1] = tokens * (value_width + 1);
  a.v_strides[2] = value_width + 1;
  if (masked) a.mask = mask.data(), a.mask_strides[0] = queries * tokens, a.mask_strides[1] = tokens;
  if (sunk) a.sinks = sinks.data;
  CHECK(ms_attend(level, &a, 2) == MS_OK);
  int wrong = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t g = h / (heads / key_heads);
        std::vector<double> weight(static_cast<size_t>(tokens));
        double whole = sunk ? std::exp(sinks.at(h)) : 0, logit_error = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          double logit = 0, size = 0;
          for (int64_t d = 0; d < width; ++d) {
            const double product = q.at(((b * queries + i) * heads + h) * width + d) *
                                   k.at(((b * key_heads + g) * tokens + t) * (width + 3) + d) * double(a.scale);
            logit += product, size += std::abs(product);
          }
          if (!masked || mask[static_cast<size_t>((b * queries + i) * tokens + t)])
            weight[static_cast<size_t>(t)] = std::exp(logit);
          whole += weight[static_cast<size_t>(t)];
          logit_error = std::max(logit_error, size * double(width + 2) * std::ldexp(1.0, -24));
        }
        for (int64_t d = 0; d < value_width; ++d) {
          double sum = 0, magnitude = 0;
          for (int64_t t = 0; t < tokens && whole > 0; ++t) {
            const double share = weight[static_cast<size_t>(t)] / whole *
                                 v.at(((b * key_heads + g) * tokens + t) * (value_width + 1) + d);
            sum += share, magnitude += std::abs(share);
          }
          // A logit's error moves its weight and the sum of all; exponentials are good to a few units in the last
          // place.
          const double relative = 2 * logit_error + double(2 * tokens + 16) * std::ldexp(1.0, -24);
          const double bound = relative * magnitude + rounded(dtype, sum);
          const double found = y.at(((b * queries + i) * heads + h) * value_width + d);
          wrong += !(std::abs(found - sum) <= bound);
        }
      }
  CHECK_IN(wrong == 0, "level %d dtype %d: %ld heads on %ld, %ld queries, %ld tokens, %ld and %ld wide: %d wrong",
           level, dtype, long(heads), long(key_heads), long(queries), long(tokens), long(width), long(value_width),
           wrong);
}

void test_rms_norm(int level, int dtype, int weights, int64_t m, int64_t n) {
  const Numbers x(m * n, dtype), w(n, weights, 3);
  Numbers y(m * n, dtype);
  y.poison();
  CHECK(ms_rms_norm(level, dtype, x.data, m, n, weights, w.data, 0.01f, y.data) == MS_OK);
  int wrong = 0;
  for (int64_t i = 0; i < m; ++i) {
    double squares = 0;
    for (int64_t j = 0; j < n; ++j) squares += x.at(i * n + j) * x.at(i * n + j);
    for (int64_t j = 0; j < n; ++j) {
      const double wanted = w.at(j) * x.at(i * n + j) / std::sqrt(squares / double(n) + double(0.01f));
      const double bound = rounded(dtype, wanted) + double(n + 8) * std::ldexp(1.0, -24) * std::abs(wanted);
      wrong += !(std::abs(y.at(i * n + j) - wanted) <= bound);
    }
  }
  CHECK_IN(wrong == 0, "level %d norm of dtype %d by %d [%ld, %ld]: %d wrong", level, dtype, weights, long(m), long(n),
           wrong);
}

void test_refusals() {
  const Numbers w(8, MS_FP32), x(4, MS_FP32);
  Numbers y(2, MS_FP32);
  const auto dense = [&](int level, int weights, int64_t n, int64_t m, int threads) {
    return ms_dense(level, weights, w.data, 4, n, 4, nullptr, MS_FP32, x.data, 4, m, y.data, threads);
  };
  CHECK(dense(0, MS_FP32, 2, 1, 1) == MS_OK);
  CHECK(dense(MS_LEVELS, MS_FP32, 2, 1, 1) == MS_BAD_LEVEL);
  CHECK(dense(-1, MS_FP32, 2, 1, 1) == MS_BAD_LEVEL);
  CHECK(dense(0, MS_DTYPES, 2, 1, 1) == MS_BAD_ARGUMENT);
  CHECK(dense(0, MS_FP32, -1, 1, 1) == MS_BAD_ARGUMENT);
  CHECK(dense(0, MS_FP32, 2, -1, 1) == MS_BAD_ARGUMENT);
  CHECK(dense(0, MS_FP32, 2, 1, 0) == MS_BAD_ARGUMENT);
  CHECK(ms_attend(0, nullptr, 1) == MS_BAD_ARGUMENT);
  ms_attention a{};
  a.heads = 3, a.key_heads = 2, a.width = 1;
  CHECK(ms_attend(0, &a, 1) == MS_BAD_ARGUMENT);
}

}  // namespace

int main() {
  for (int level = 0; level <= ms_level(); ++level) {
    for (int weights : {MS_BF16, MS_FP16, MS_FP32})
      for (int dtype : {MS_BF16, MS_FP16, MS_FP32}) {
        for (int64_t m = 1; m <= 9; ++m) test_dense(level, weights, dtype, {m, 13, 70, 0});
        for (int64_t k : {0, 1, 15, 16, 17, 31, 32, 33, 64, 95}) test_dense(level, weights, dtype, {3, 5, k, 1});
        test_dense(level, weights, dtype, {70, 3, 33, 2});
        test_dense(level, weights, dtype, {17, 129, 48, 0});
        test_dense(level, weights, dtype, {1, 300, 512, 0});  // more than one unit
        test_dense(level, weights, dtype, {0, 4, 8, 0});
        test_dense(level, weights, dtype, {2, 0, 8, 0});
      }
    for (int dtype : {MS_BF16, MS_FP16, MS_FP32})
      for (int weights : {MS_BF16, MS_FP16, MS_FP32})
        for (int64_t n : {1, 15, 16, 33, 2880}) test_rms_norm(level, dtype, weights, 3, n);
    for (int dtype : {MS_BF16, MS_FP16, MS_FP32})
      for (int how = 0; how < 4; ++how) {
        const bool masked = how & 1, sunk = how & 2;
        test_attend(level, dtype, 1, 8, 1, 1, 37, 64, 64, masked, sunk);
        test_attend(level, dtype, 2, 6, 2, 3, 5, 20, 33, masked, sunk);
        test_attend(level, dtype, 1, 5, 1, 2, 130, 17, 130, masked, sunk);
        test_attend(level, dtype, 1, 2, 2, 1, 1, 1, 1, masked, sunk);
        test_attend(level, dtype, 1, 2, 2, 1, 0, 8, 8, masked, sunk);
        test_attend(level, dtype, 3, 4, 4, 0, 4, 8, 8, masked, sunk);
      }
  }
  test_refusals();
  return check::finish("test_dense");
}
