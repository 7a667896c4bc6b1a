// ms_linear and ms_moe at every level of this machine against double precision on the same numbers, under sanitizers
// that see every byte read or written outside of what was given. Shapes, formats and options at length: the Python
// tests.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/elements.h"
#include "tensor.h"

namespace {

using microscale::Encoding;

float from_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float element(int format, int code) {
  const auto value = [&](Encoding e) { return from_bits(microscale::float_bits(e, static_cast<uint32_t>(code))); };
  switch (format) {
    case MS_MXFP4:
    case MS_NVFP4: return value(microscale::kE2M1);
    case MS_MXFP6_E2M3: return value(microscale::kE2M3);
    case MS_MXFP6_E3M2: return value(microscale::kE3M2);
    case MS_MXFP8_E5M2: return value(microscale::kE5M2);
    case MS_MXINT8: return static_cast<float>(static_cast<int8_t>(code)) / 64;
    default: return value(microscale::kE4M3);
  }
}

// A tensor of ordinary numbers, packed, and what it stands for.
struct Weights {
  Weights(int format, int64_t e, int64_t n, int64_t k, unsigned seed)
      : tensor(format, e, n, k), packed(packed_bytes(tensor)), values(static_cast<size_t>(e * n * k)) {
    std::mt19937 random(seed);
    const Facts &facts = kFacts[format];
    for (uint8_t &byte : tensor.codes) byte = static_cast<uint8_t>(random() & (facts.bits == 8 ? 0xbb : 0xff));
    if (format == MS_FP8_BLOCK128) {
      for (size_t i = 0; i + 4 <= tensor.scales.size(); i += 4) {
        const float scale = 0.01f + static_cast<float>(random() % 100) / 400;
        std::memcpy(&tensor.scales[i], &scale, 4);
      }
    } else {
      for (uint8_t &byte : tensor.scales)
        byte = static_cast<uint8_t>(format == MS_NVFP4 ? 0x18 + random() % 32 : 120 + random() % 6);
    }
    clear_tails();
    CHECK(pack(tensor, packed.data()) == MS_OK);
    for (int64_t x = 0; x < e; ++x)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) {
          const int64_t block = j / facts.columns;
          const uint8_t *s = tensor.scale(x, i / facts.rows, block);
          float scale;
          if (format == MS_FP8_BLOCK128)
            std::memcpy(&scale, s, 4);
          else if (format == MS_NVFP4)
            scale = from_bits(microscale::float_bits(microscale::kE4M3, *s));
          else
            scale = std::ldexp(1.0f, *s - 127);
          values[static_cast<size_t>((x * n + i) * k + j)] =
              double(element(format, canonical_code(tensor.row(x, i), facts.bits, j))) * double(scale);
        }
  }
  double at(int64_t e, int64_t n, int64_t k) const {
    return values[static_cast<size_t>((e * tensor.n + n) * tensor.k + k)];
  }

  Tensor tensor;
  Buffer packed;
  std::vector<double> values;

 private:
  // Bits beyond K in a row's last byte must be zero.
  void clear_tails() {
    const int64_t used = tensor.k * kFacts[tensor.format].bits % 8;
    if (used == 0) return;
    for (int64_t r = 1; r <= tensor.e * tensor.n; ++r)
      tensor.codes[static_cast<size_t>(r * tensor.stride - 1)] &= static_cast<uint8_t>((1 << used) - 1);
  }
};

std::vector<float> numbers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> v(static_cast<size_t>(count));
  // Eight significant bits: the same number in every dtype.
  for (float &x : v) x = (static_cast<float>(random() % 256) - 127.5f) / 64;
  return v;
}

// Exactly as many bytes as there are numbers, so that the sanitizer sees the first one too many.
std::vector<uint8_t> stored(const std::vector<float> &v, int dtype) {
  std::vector<uint8_t> bytes(v.size() * (dtype == MS_FP32 ? 4 : 2));
  for (size_t i = 0; i < v.size(); ++i) {
    const uint16_t half = to_bf16(v[i]);
    if (dtype == MS_FP32)
      std::memcpy(&bytes[4 * i], &v[i], 4);
    else
      std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

float loaded(const std::vector<uint8_t> &bytes, int dtype, int64_t i) {
  if (dtype == MS_FP32) {
    float v;
    std::memcpy(&v, &bytes[static_cast<size_t>(4 * i)], 4);
    return v;
  }
  uint16_t half;
  std::memcpy(&half, &bytes[static_cast<size_t>(2 * i)], 2);
  return from_bits(static_cast<uint32_t>(half) << 16);
}

void test_linear(int level, int format, int dtype, int64_t m, int64_t n, int64_t k) {
  const Weights w(format, 1, n, k, static_cast<unsigned>(n + k));
  const auto x = numbers(m * k, 1), bias = numbers(n, 2), factors = numbers(m, 4);  // factors: of rows
  const auto in = stored(x, dtype);
  std::vector<uint8_t> out(static_cast<size_t>(m * n * (dtype == MS_FP32 ? 4 : 2)), 0xff);  // NaN
  CHECK(ms_linear(level, w.packed.data(), nullptr, dtype, in.data(), k, factors.data(), m, bias.data(), out.data(),
                  2) == MS_OK);
  int wrong = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < n; ++c) {
      double sum = double(bias[static_cast<size_t>(c)]), magnitude = std::abs(sum);
      for (int64_t j = 0; j < k; ++j) {
        // The values that arrive: bfloat16 rounds halves of 1/64 away.
        const double a = double(loaded(in, dtype, i * k + j)) * double(factors[static_cast<size_t>(i)]) * w.at(0, c, j);
        sum += a;
        magnitude += std::abs(a);
      }
      const double rounding = dtype == MS_FP32 ? 0 : std::ldexp(1.01, -8) * std::abs(sum);
      const double bound = double(k + 2) * std::ldexp(1.0, -24) * magnitude + rounding;
      wrong += !(std::abs(double(loaded(out, dtype, i * n + c)) - sum) <= bound);
    }
  CHECK_IN(wrong == 0, "level %d format %d dtype %d [%ld, %ld, %ld]: %d wrong", level, format, dtype, long(m), long(n),
           long(k), wrong);
}

// A row's result is the same to the bit, whatever rows are beside it and however they share tiles.
void test_rows(int level, int format, int dtype) {
  constexpr int64_t kMost = 100, kN = 70, kK = 160;
  const Weights w(format, 1, kN, kK, 8);
  const auto in = stored(numbers(kMost * kK, 9), dtype);
  const auto out = [&](int64_t m) {
    std::vector<uint8_t> y(static_cast<size_t>(m * kN * (dtype == MS_FP32 ? 4 : 2)));
    CHECK(ms_linear(level, w.packed.data(), nullptr, dtype, in.data(), kK, nullptr, m, nullptr, y.data(), 2) == MS_OK);
    return y;
  };
  const auto all = out(kMost);
  for (int64_t m : {1, 2, 15, 16, 17, 20, 33, 47, 49, 65}) {
    const auto some = out(m);
    CHECK_IN(std::memcmp(some.data(), all.data(), some.size()) == 0, "level %d format %d dtype %d: %ld rows", level,
             format, dtype, long(m));
  }
}

double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

void test_moe(int level, int format, int dtype, int64_t m, int64_t width, int64_t hidden, int threads = 2,
              int64_t experts = 3) {
  constexpr int64_t kRoutes = 2;
  const Weights w13(format, experts, 2 * width, hidden, 3), w2(format, experts, hidden, width, 4);
  const auto x = numbers(m * hidden, 5), b13 = numbers(experts * 2 * width, 6), b2 = numbers(experts * hidden, 7);
  const auto in = stored(x, dtype);
  std::vector<int64_t> ids(static_cast<size_t>(m * kRoutes));
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = i % 5 == 4 ? -1 : experts > 3 && i % 3 == 0 ? 0 : static_cast<int64_t>(i) * 7 % experts;
  std::vector<float> weights(ids.size(), 0.375f);
  const ms_activation activation{MS_SILU, 1, 0, 0, 0, std::numeric_limits<float>::infinity()};
  const size_t row = in.size() / static_cast<size_t>(m);
  std::vector<uint8_t> out(in.size(), 0xff), alone(row, 0xff);
  const auto moe = [&](int64_t first, int64_t rows, uint8_t *y, int with) {
    CHECK(ms_moe(level, w13.packed.data(), nullptr, w2.packed.data(), nullptr, dtype,
                 in.data() + static_cast<size_t>(first) * row, nullptr, rows, ids.data() + first * kRoutes,
                 weights.data(), kRoutes, &activation, b13.data(), b2.data(), 0, y, with) == MS_OK);
  };
  moe(0, m, out.data(), threads);
  moe(m - 1, 1, alone.data(), 3 - threads);
  CHECK_IN(std::memcmp(alone.data(), out.data() + in.size() - row, row) == 0,
           "level %d format %d dtype %d [%ld, %ld, %ld]: the last row alone", level, format, dtype, long(m),
           long(width), long(hidden));
  double error = 0, size = 0;
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> want(static_cast<size_t>(hidden));
    for (int64_t t = 0; t < kRoutes; ++t) {
      const int64_t e = ids[static_cast<size_t>(i * kRoutes + t)];
      if (e < 0) continue;
      std::vector<double> middle(static_cast<size_t>(width));
      for (int64_t c = 0; c < width; ++c) {
        double gate = double(b13[static_cast<size_t>(e * 2 * width + c)]);
        double up = double(b13[static_cast<size_t>(e * 2 * width + width + c)]);
        for (int64_t j = 0; j < hidden; ++j) {
          const double a = double(loaded(in, dtype, i * hidden + j));
          gate += a * w13.at(e, c, j);
          up += a * w13.at(e, width + c, j);
        }
        middle[static_cast<size_t>(c)] = gate * sigmoid(gate) * up;
      }
      for (int64_t c = 0; c < hidden; ++c) {
        double sum = double(b2[static_cast<size_t>(e * hidden + c)]);
        for (int64_t j = 0; j < width; ++j) sum += middle[static_cast<size_t>(j)] * w2.at(e, c, j);
        want[static_cast<size_t>(c)] += 0.375 * sum;
      }
    }
    for (int64_t c = 0; c < hidden; ++c) {
      const double v = want[static_cast<size_t>(c)];
      error += std::pow(double(loaded(out, dtype, i * hidden + c)) - v, 2);
      size += v * v;
    }
  }
  const double relative = std::sqrt(error / (size > 0 ? size : 1));
  CHECK_IN(relative <= (dtype == MS_FP32 ? 1e-5 : 6e-3), "level %d format %d dtype %d [%ld, %ld, %ld]: error %g", level,
           format, dtype, long(m), long(width), long(hidden), relative);
}

void test_refusals() {
  const Weights w(MS_MXFP4, 1, 16, 32, 1);
  float x[32] = {}, y[16] = {};
  Buffer broken(w.packed.bytes);
  std::memcpy(broken.data(), w.packed.data(), static_cast<size_t>(w.packed.bytes));
  broken.data()[0] ^= 1;
  CHECK(ms_linear(0, broken.data(), nullptr, MS_FP32, x, 32, nullptr, 1, nullptr, y, 1) == MS_BAD_HEADER);
  CHECK(ms_linear(MS_LEVELS, w.packed.data(), nullptr, MS_FP32, x, 32, nullptr, 1, nullptr, y, 1) == MS_BAD_LEVEL);
  CHECK(ms_linear(0, w.packed.data(), nullptr, MS_DTYPES, x, 32, nullptr, 1, nullptr, y, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_linear(0, w.packed.data(), nullptr, MS_FP32, x, 32, nullptr, -1, nullptr, y, 1) == MS_BAD_ARGUMENT);
}

}  // namespace

int main() {
  for (int level = 0; level <= ms_level(); ++level)
    for (int format = 0; format < MS_FORMATS; ++format)
      for (int dtype : {MS_BF16, MS_FP32}) {
        for (int64_t m : {1, 4, 5, 19}) test_linear(level, format, dtype, m, 33, 96);
        test_linear(level, format, dtype, 3, 130, 272);
        test_linear(level, format, dtype, 37, 70, 32);
        test_linear(level, format, dtype, 67, 50, 1200);
        for (int64_t m : {50, 100}) test_linear(level, format, dtype, m, 33, 96);  // 4 and 7 tiles of rows
        test_rows(level, format, dtype);
        test_moe(level, format, dtype, 1, 32, 64);
        test_moe(level, format, dtype, 7, 48, 80);
        test_moe(level, format, dtype, 40, 40, 32);
        if (dtype == MS_BF16) test_moe(level, format, dtype, 75, 40, 544);
        test_moe(level, format, dtype, 100, 32, 528, 1);  // several groups of columns of the second product at a time
      }
  // So many experts of many rows that some are not divided among threads: not the largest, and not the last.
  for (int level = 0; level <= ms_level(); ++level) test_moe(level, MS_MXFP4, MS_BF16, 150, 100, 80, 2, 11);
  // Groups of the second product that are too large to be multiplied together.
  test_moe(ms_level(), MS_MXFP8_E4M3, MS_BF16, 100, 2080, 528, 1);
  test_refusals();
  return check::finish("test_kernels");
}
