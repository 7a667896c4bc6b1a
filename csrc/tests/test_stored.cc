// Activations in a format: a row's numbers are the same to the bit beside others, alone and with more threads; what
// lies behind it stays as it is; and what is stored already stays, too.
#include <cstring>
#include <vector>

#include "check.h"
#include "microscale.h"
#include "numbers.h"
#include "operands.h"

namespace {

constexpr int64_t kRows = 23;

void test_rows(int level, int format, int dtype, int to, int64_t k) {
  using microscale::element_bytes;
  const int64_t stride = k + 3, in = element_bytes(dtype), out = element_bytes(to);
  std::vector<uint8_t> x(static_cast<size_t>(kRows * stride * in), 0xff);  // NaN between the rows
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t i = 0; i < k; ++i) {
      const float v = number() * 3.1f;
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      if (dtype == MS_FP32)
        std::memcpy(&x[static_cast<size_t>((row * stride + i) * 4)], &bits, 4);
      else  // the upper half is a number of either dtype
        std::memcpy(&x[static_cast<size_t>((row * stride + i) * 2)], reinterpret_cast<uint8_t *>(&bits) + 2, 2);
    }
  const auto run = [&](const void *from, int type, int64_t step, int64_t m, int threads, std::vector<uint8_t> &y) {
    y.assign(static_cast<size_t>(m * k * out + 64), 0xab);
    CHECK(ms_stored(level, format, type, from, step, m, k, to, y.data(), nullptr, threads) == MS_OK);
    for (size_t i = static_cast<size_t>(m * k * out); i < y.size(); ++i) CHECK(y[i] == 0xab);
  };
  std::vector<uint8_t> all, alone, again;
  run(x.data(), dtype, stride, kRows, 1, all);
  run(x.data(), dtype, stride, kRows, 3, again);
  CHECK(all == again);
  run(all.data(), to, k, kRows, 2, again);
  if (format <= MS_MXINT8)  // a float32 scale of what has been rounded may be another one
    CHECK_IN(all == again, "level %d format %d dtype %d to %d k %ld", level, format, dtype, to, long(k));
  for (int64_t row = 0; row < kRows; ++row) {
    run(&x[static_cast<size_t>(row * stride * in)], dtype, stride, 1, 2, alone);
    CHECK_IN(std::memcmp(alone.data(), &all[static_cast<size_t>(row * k * out)], static_cast<size_t>(k * out)) == 0,
             "level %d format %d dtype %d to %d k %ld row %ld", level, format, dtype, to, long(k), long(row));
  }
}

// NVFP4 with its rows' multipliers apart: every dtype holds the numbers, and their products are what it reads back as.
void test_apart(int level, int to, int64_t k) {
  std::vector<float> x(static_cast<size_t>(kRows * k)), wanted = x;
  std::vector<float> outer(kRows, -1.0f), again = outer;
  for (float &v : x) v = number() * 3.1f;
  Numbers y(kRows * k, to), other(kRows * k, to);
  CHECK(ms_stored(level, MS_NVFP4, MS_FP32, x.data(), k, kRows, k, MS_FP32, wanted.data(), nullptr, 1) == MS_OK);
  CHECK(ms_stored(level, MS_NVFP4, MS_FP32, x.data(), k, kRows, k, to, y.data, outer.data(), 1) == MS_OK);
  CHECK(ms_stored(level, MS_NVFP4, MS_FP32, x.data(), k, kRows, k, to, other.data, again.data(), 3) == MS_OK);
  CHECK(outer == again && y.bytes == other.bytes);
  int wrong = 0;
  for (int64_t i = 0; i < kRows * k; ++i)
    wrong += static_cast<float>(y.at(i)) * outer[static_cast<size_t>(i / k)] != wanted[static_cast<size_t>(i)];
  CHECK_IN(wrong == 0, "level %d to %d k %ld: %d wrong", level, to, long(k), wrong);
}

}  // namespace

int main() {
  uint8_t none[4] = {};
  float outer;
  CHECK(ms_stored(0, MS_NVFP4, MS_FP32, none, 1, 1, 1, MS_BF16, none, nullptr, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_stored(0, MS_FORMATS, MS_FP32, none, 1, 1, 1, MS_FP32, none, nullptr, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_stored(0, MS_FP8_BLOCK128, MS_FP32, none, 1, 1, 1, MS_BF16, none, nullptr, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_stored(0, MS_MXFP4, MS_FP32, none, 1, 1, 1, MS_FP32, none, &outer, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_stored(0, MS_MXFP4, MS_FP32, none, 1, 1, 0, MS_FP32, none, nullptr, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_stored(ms_level() + 1, MS_MXFP4, MS_FP32, none, 1, 1, 1, MS_FP32, none, nullptr, 1) == MS_BAD_LEVEL);
  CHECK(ms_stored(0, MS_MXFP4, MS_FP32, none, 1, 0, 1, MS_FP32, none, nullptr, 1) == MS_OK);
  for (int level = 0; level <= ms_level(); ++level)
    for (int format :
         {MS_MXFP4, MS_MXFP6_E2M3, MS_MXFP6_E3M2, MS_MXFP8_E4M3, MS_MXFP8_E5M2, MS_MXINT8, MS_NVFP4, MS_FP8_BLOCK128})
      for (int dtype : {MS_BF16, MS_FP16, MS_FP32})
        for (int64_t k : {1, 31, 32, 33, 128, 130, 2880})
          for (int to : {MS_BF16, MS_FP32})
            if (to == MS_FP32 || format <= MS_MXINT8) test_rows(level, format, dtype, to, k);
  for (int level = 0; level <= ms_level(); ++level)
    for (int to : {MS_BF16, MS_FP16, MS_FP32})
      for (int64_t k : {1, 15, 16, 33, 2880}) test_apart(level, to, k);
  return check::finish("test_stored");
}
