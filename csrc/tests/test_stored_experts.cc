// Experts whose activations are stored: squares of numbers through two unit matrices, which round them once in front of
// ms_stored's rounding and not at all behind it. At every level, AMX's tiles in memory included.
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "microscale.h"
#include "numbers.h"
#include "tensor.h"

namespace {

constexpr int64_t kExperts = 3;
constexpr ms_activation kSquare{MS_RELU2, 0, 0, 0, 0, std::numeric_limits<float>::infinity(), 0};

// [kExperts, width, width] in MXFP8, 1 on each diagonal.
struct Units {
  explicit Units(int64_t width) : tensor(MS_MXFP8_E4M3, kExperts, width, width), packed(packed_bytes(tensor)) {
    for (uint8_t &byte : tensor.scales) byte = 127;
    for (int64_t e = 0; e < kExperts; ++e)
      for (int64_t i = 0; i < width; ++i) tensor.row(e, i)[i] = 0x38;
    CHECK(pack(tensor, packed.data()) == MS_OK);
  }
  Tensor tensor;
  Buffer packed;
};

std::vector<float> rounded(int level, int format, const std::vector<float> &x, int64_t m, int64_t k) {
  std::vector<float> y(x.size());
  CHECK(ms_stored(level, format, MS_FP32, x.data(), k, m, k, MS_FP32, y.data(), nullptr, 1) == MS_OK);
  return y;
}

void test_experts(int level, int format, int dtype, int64_t m, int64_t width) {
  const Units units(width);
  const auto count = static_cast<size_t>(m * width);
  std::vector<float> x(count), outer(static_cast<size_t>(m));
  for (float &v : x) v = number() * std::ldexp(1.0f, static_cast<int>(generator() % 12) - 6);
  if (m > 2) x[static_cast<size_t>(width)] = std::nanf("");
  Numbers rows(m * width, dtype, 0), y(m * width, dtype, 0);
  float *apart = format == MS_NVFP4 ? outer.data() : nullptr;
  CHECK(ms_stored(level, format, MS_FP32, x.data(), width, m, width, dtype, rows.data, apart, 1) == MS_OK);
  std::vector<int64_t> ids(static_cast<size_t>(m));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = i % 7 == 6 ? -1 : i % 4 ? 2 : 0;
  const std::vector<float> weights(ids.size(), 1.0f);
  ms_activation activation = kSquare;
  activation.stored = 1 + format;

  std::vector<float> squares = rounded(level, format, x, m, width);
  for (float &v : squares) v = v > 0 ? v * v : v == v ? 0.0f : v;
  const std::vector<float> wanted = rounded(level, format, squares, m, width);
  for (int threads : {1, 3}) {
    y.poison();
    CHECK(ms_moe(level, units.packed.data(), nullptr, units.packed.data(), nullptr, dtype, rows.data, apart, m,
                 ids.data(), weights.data(), 1, &activation, nullptr, nullptr, 0, y.data, threads) == MS_OK);
    int wrong = 0;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < width; ++c) {
        const float v = ids[static_cast<size_t>(i)] < 0 ? 0.0f : wanted[static_cast<size_t>(i * width + c)];
        const float in_dtype = dtype == MS_FP32 ? v : float_of(half_of(v, dtype), dtype);
        const double found = y.at(i * width + c);
        wrong += m > 2 && i == 1 ? !std::isnan(found) : found != double(in_dtype);  // a product with NaN is NaN
      }
    CHECK_IN(wrong == 0, "level %d format %d dtype %d [%ld, %ld] threads %d: %d wrong", level, format, dtype, long(m),
             long(width), threads, wrong);
  }
}

void test_refusals() {
  const Units units(32);
  float x[32] = {}, y[32] = {}, weight = 1;
  int64_t id = 0;
  const auto status = [&](int dtype, int stored) {
    ms_activation activation = kSquare;
    activation.stored = stored;
    return ms_moe(0, units.packed.data(), nullptr, units.packed.data(), nullptr, dtype, x, nullptr, 1, &id, &weight, 1,
                  &activation, nullptr, nullptr, 0, y, 1);
  };
  CHECK(status(MS_FP32, 1 + MS_FP8_BLOCK128) == MS_OK);
  CHECK(status(MS_FP16, 1 + MS_NVFP4) == MS_OK);
  CHECK(status(MS_BF16, 1 + MS_FP8_BLOCK128) == MS_BAD_ARGUMENT);
  CHECK(status(MS_FP32, 1 + MS_FORMATS) == MS_BAD_ARGUMENT);
  CHECK(status(MS_FP32, -1) == MS_BAD_ARGUMENT);
}

}  // namespace

int main() {
  for (int level = 0; level <= ms_level(); ++level)
    for (int format = 0; format < MS_FORMATS; ++format)
      for (int dtype : {MS_BF16, MS_FP32})
        for (int64_t m : {1, 3, 20, 75})
          for (int64_t width : {1, 33, 64, 300})
            if (dtype == MS_FP32 || format != MS_FP8_BLOCK128) test_experts(level, format, dtype, m, width);
  test_refusals();
  return check::finish("test_stored_experts");
}
