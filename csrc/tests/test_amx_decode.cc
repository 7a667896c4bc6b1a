// The AMX level's decoded tiles against a slow decoder: needs AVX-512 alone, no AMX.
//   g++ -std=c++20 -O1 -g -mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile
//     -mamx-bf16 -Wno-psabi -Icsrc csrc/tests/test_amx_decode.cc -o test_amx_decode
#include <cmath>
#include <cstring>
#include <random>

#include "check.h"
#include "kernels/isa_amx.cc"

namespace microscale {
namespace {

float small_float(Encoding e, int code) {
  const uint32_t bits = float_bits(e, static_cast<uint32_t>(code));
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

float element(int format, int code) {
  switch (format) {
    case MS_MXFP4:
    case MS_NVFP4: return small_float(kE2M1, code);
    case MS_MXFP6_E2M3: return small_float(kE2M3, code);
    case MS_MXFP6_E3M2: return small_float(kE3M2, code);
    case MS_MXFP8_E5M2: return small_float(kE5M2, code);
    case MS_MXINT8: return static_cast<float>(static_cast<int8_t>(code)) / 64;
    default: return small_float(kE4M3, code);
  }
}

int code_at(const uint8_t *tile, int bits, int n, int k) {
  const int p = k % 2;
  const auto half = [&](int word) {
    uint32_t w;
    std::memcpy(&w, tile + 4 * word, 4);
    return w >> (16 * p) & 0xffff;
  };
  if (bits == 8) return static_cast<int>(half(k / 4 * 16 + n) >> (8 * (k / 2 % 2)) & 255);
  int code = static_cast<int>(half(k / 8 * 16 + n) >> (4 * (k / 2 % 4)) & 15);
  if (bits == 6) code |= static_cast<int>(half(64 + k / 16 * 16 + n) >> (2 * (k / 2 % 8)) & 3) << 4;
  return code;
}

// Codes that are no numbers never reach these decoders.
bool number(int format, int code) {
  if (format == MS_MXFP8_E5M2) return (code & 0x7c) != 0x7c;
  return (format != MS_MXFP8_E4M3 && format != MS_FP8_BLOCK128) || (code & 0x7f) != 0x7f;
}

template <int kFormat>
void check_scale(int scale, unsigned seed) {
  constexpr int kBits = traits(kFormat).bits;
  alignas(64) uint8_t tile[tile_bytes(kFormat)], scales[32];
  alignas(64) uint16_t out[16][16][2];
  std::mt19937 random(seed);
  for (uint8_t &byte : tile) {
    do byte = static_cast<uint8_t>(random());
    while (!number(kFormat, byte));
  }
  std::memset(scales, scale, sizeof scales);
  const Decoder<kFormat> decoder;
  typename Decoder<kFormat>::Change change;
  auto *to = reinterpret_cast<uint8_t *>(out);
  decoder.template quarter<0>(tile, scales, change, to);
  decoder.template quarter<1>(tile, scales, change, to);
  decoder.template quarter<2>(tile, scales, change, to);
  decoder.template quarter<3>(tile, scales, change, to);
  const float factor = kFormat == MS_FP8_BLOCK128 ? 1.0f
                       : kFormat == MS_NVFP4      ? small_float(kE4M3, scale)
                                                  : std::ldexp(1.0f, scale - 127);
  int wrong = 0;
  for (int k = 0; k < 32; ++k)
    for (int n = 0; n < 16; ++n) {
      const float want = element(kFormat, code_at(tile, kBits, n, k)) * factor;
      const uint32_t bits = static_cast<uint32_t>(out[k / 2][n][k % 2]) << 16;
      float found;
      std::memcpy(&found, &bits, 4);
      wrong += found != want;
    }
  CHECK_IN(wrong == 0, "format %d scale %d: %d wrong", kFormat, scale, wrong);
}

template <int kFormat>
void check_format() {
  const bool e4m3 = kFormat == MS_NVFP4;
  for (int scale = e4m3 ? 0 : 32; scale <= (e4m3 ? 0x7e : 222); ++scale)
    for (unsigned seed = 0; seed < 8; ++seed) check_scale<kFormat>(scale, seed);
}

}  // namespace
}  // namespace microscale

int main() {
  using namespace microscale;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512bf16")) {
    std::puts("test_amx_decode: skipped, this processor has no AVX-512");
    return 0;
  }
  check_format<MS_MXFP4>();
  check_format<MS_MXFP6_E2M3>();
  check_format<MS_MXFP6_E3M2>();
  check_format<MS_MXFP8_E4M3>();
  check_format<MS_MXFP8_E5M2>();
  check_format<MS_MXINT8>();
  check_format<MS_NVFP4>();
  check_format<MS_FP8_BLOCK128>();
  return check::finish("test_amx_decode");
}
