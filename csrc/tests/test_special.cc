// MS_SPECIAL: set for exactly the scales and codes that the fast paths cannot decode.
//
// From csrc:
//   g++ -std=c++20 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wall -Wextra -I.
//       -pthread tests/test_special.cc pack.cc parallel.cc -o test_special
#include <cmath>
#include <limits>

#include "check.h"
#include "tensor.h"

namespace {

uint32_t flags(const Tensor &t) {
  Buffer out(packed_bytes(t));
  if (!CHECK(pack(t, out.data()) == MS_OK)) return ~0u;
  ms_header header;
  std::memcpy(&header, out.data(), sizeof header);
  return header.flags;
}

void set_code(Tensor &t, int64_t n, int64_t k, int code) {
  const int bits = kFacts[t.format].bits;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = k * bits + b;
    uint8_t &byte = t.row(t.e - 1, n)[bit / 8];
    byte = static_cast<uint8_t>((byte & ~(1 << bit % 8)) | (code >> b & 1) << bit % 8);
  }
}

void test_special_e8m0() {
  for (int format = MS_MXFP4; format <= MS_MXINT8; ++format) {
    const int sign = 1 << (kFacts[format].bits - 1);
    for (int scale = 0; scale < 256; ++scale) {
      const bool far = scale < 32 || scale > 222;
      // 21 columns and 70 k: the block lies in a ragged panel and a ragged tile.
      Tensor t(format, 2, 21, 70);
      std::memset(t.scales.data(), 127, t.scales.size());
      *t.scale(1, 20, 2) = static_cast<uint8_t>(scale);
      CHECK_IN(flags(t) == (scale == 255 ? MS_SPECIAL : 0), "format %d scale %d, zeros", format, scale);
      set_code(t, 20, 69, sign);
      CHECK_IN(flags(t) == (scale == 255 || (far && format == MS_MXINT8) ? MS_SPECIAL : 0),
               "format %d scale %d, only a sign", format, scale);
      set_code(t, 20, 69, 0);
      set_code(t, 20, 63, 1), set_code(t, 19, 69, 1);  // the neighbours' blocks
      CHECK_IN(flags(t) == (scale == 255 ? MS_SPECIAL : 0), "format %d scale %d, neighbours", format, scale);
    }
    for (int k = 0; k < 32; ++k) {  // every bit of every position makes a number, but a float's sign
      for (int bit = 1; bit <= sign; bit *= 2) {
        Tensor t(format, 1, 3, 32);
        set_code(t, 1, k, bit);
        *t.scale(0, 1, 0) = 31;
        const bool number = bit != sign || format == MS_MXINT8;
        CHECK_IN(flags(t) == (number ? MS_SPECIAL : 0), "format %d k %d bit %d", format, k, bit);
        *t.scale(0, 1, 0) = 32;
        CHECK(flags(t) == 0);
      }
    }
  }
}

void test_special_e4m3() {
  for (int scale = 0; scale < 256; ++scale) {
    Tensor t(MS_NVFP4, 2, 17, 40);
    t.randomize(1);
    std::memset(t.scales.data(), 0x38, t.scales.size());
    *t.scale(0, 16, 2) = static_cast<uint8_t>(scale);
    CHECK_IN(flags(t) == (scale >= 0x7f ? MS_SPECIAL : 0), "scale %d", scale);
  }
}

void test_special_float32() {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float edge = std::ldexp(1.0f, 60), tiny = std::ldexp(1.0f, -60);
  const struct {
    float scale;
    bool special;
  } cases[] = {{1, false},  {edge, false}, {std::nextafter(edge, inf), true},
               {0, false},  {tiny, false}, {std::nextafter(tiny, 0.0f), true},
               {inf, true}, {nan, true},   {std::numeric_limits<float>::denorm_min(), true}};
  for (const auto &c : cases) {
    for (float scale : {c.scale, -c.scale}) {
      Tensor t(MS_FP8_BLOCK128, 2, 130, 200);
      std::vector<float> scales(t.scales.size() / 4, 1.0f);
      scales.back() = scale;
      std::memcpy(t.scales.data(), scales.data(), t.scales.size());
      CHECK_IN(flags(t) == (c.special ? MS_SPECIAL : 0), "scale %g", double(scale));
    }
  }
}

void test_special_codes() {
  for (int format : {MS_MXFP8_E4M3, MS_MXFP8_E5M2, MS_MXINT8, MS_FP8_BLOCK128}) {
    for (int code = 0; code < 256; ++code) {
      Tensor t(format, 1, 19, 33);
      const float one = 1;
      if (format == MS_FP8_BLOCK128) {
        std::memcpy(t.scales.data(), &one, 4);
      } else {
        std::memset(t.scales.data(), 127, t.scales.size());
      }
      set_code(t, code % 19, code % 33, code);
      const int mask = format == MS_MXFP8_E5M2 ? 0x7c : 0x7f;
      const bool special = format != MS_MXINT8 && (code & mask) == mask;
      CHECK_IN(flags(t) == (special ? MS_SPECIAL : 0), "format %d code %d", format, code);
    }
  }
}

}  // namespace

int main() {
  test_special_e8m0();
  test_special_e4m3();
  test_special_float32();
  test_special_codes();
  return check::finish("test_special");
}
