// Activations take several rows side by side: a row's results are the same to the bit beside others and alone.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "microscale.h"
#include "numbers.h"

namespace {

constexpr int64_t kRows = 11, kStride = 80;

struct Case {
  int level, dtype, kind, gated, interleaved, scaled, stored;
  int64_t n;
};

void test_rows(const Case &c) {
  using namespace microscale;
  const Kernels *kernels = kernels_for(c.level, c.dtype, false);
  std::vector<float> raw(static_cast<size_t>(kRows * kStride)), up = raw, outer(kStride), bias(kStride);
  for (auto *v : {&raw, &up, &outer, &bias})
    for (float &x : *v) x = number() * 3.1f;
  raw[3] = std::nanf("");
  raw[kStride + 5] = std::numeric_limits<float>::infinity();
  raw[4 * kStride] = -std::numeric_limits<float>::infinity();
  const ms_activation activation{c.kind, c.gated, c.interleaved, 1.702f, 1.25f, 2.5f, c.stored};
  const auto run = [&](int64_t first, int64_t m, std::vector<uint8_t> &y) {
    std::vector<void *> out;
    for (int64_t i = 0; i < m; ++i) out.push_back(y.data() + i * 128);
    Activate a{};
    a.gate = raw.data() + first * kStride;
    a.up = c.gated && !c.interleaved ? up.data() + first * kStride : nullptr;
    a.stride = kStride;
    a.m = m;
    a.n = c.n;
    if (c.scaled) a.gate_outer = a.up_outer = outer.data(), a.gate_bias = a.up_bias = bias.data();
    a.activation = &activation;
    a.out = out.data();
    kernels->activate(&a);
  };
  std::vector<uint8_t> all(kRows * 128, 0xab);
  run(0, kRows, all);
  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<uint8_t> alone(128, 0xab);
    run(row, 1, alone);
    CHECK_IN(std::memcmp(alone.data(), all.data() + row * 128, 128) == 0,
             "level %d dtype %d kind %d gated %d interleaved %d scaled %d stored %d n %ld row %ld", c.level, c.dtype,
             c.kind, c.gated, c.interleaved, c.scaled, c.stored, long(c.n), long(row));
  }
}

}  // namespace

int main() {
  for (int level = 0; level <= ms_level(); ++level)
    for (int dtype : {MS_BF16, MS_FP32})
      for (int kind = 0; kind < MS_KINDS; ++kind)
        for (int shape = 0; shape < 3; ++shape)
          for (int scaled = 0; scaled < 2; ++scaled)
            for (int64_t n : {1, 8, 13, 16, 24, 31, 32})
              for (int stored : {0, 1 + MS_MXFP4, 1 + MS_MXFP8_E4M3, 1 + MS_MXINT8})
                test_rows({level, dtype, kind, shape > 0, shape == 2, scaled, stored, n});
  return check::finish("test_activation");
}
