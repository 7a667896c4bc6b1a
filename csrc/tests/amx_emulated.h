// AMX tiles in memory, for machines without them: included in front of a unit that is compiled for AMX, this takes the
// place of the instructions. They do what Intel's manual (volume 2, TDPBF16PS) says, but for numbers below 2^-126,
// which the instruction takes as zero. It also ends the process where the processor would raise an exception.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace microscale {
namespace {

struct EmulatedTiles {
  static constexpr int kCount = 8, kRows = 16, kBytes = 64;
  uint8_t rows[kCount];
  uint16_t column_bytes[kCount];
  bool configured;
  alignas(64) uint8_t data[kCount][kRows][kBytes];

  void configure(const void *config) {
    const auto *bytes = static_cast<const uint8_t *>(config);
    for (int t = 0; t < kCount; ++t) {
      __builtin_memcpy(&column_bytes[t], bytes + 16 + 2 * t, 2);
      rows[t] = bytes[48 + t];
      if (rows[t] > kRows || column_bytes[t] > kBytes || column_bytes[t] % 4) __builtin_trap();
    }
    if (bytes[0] != 1) __builtin_trap();
    __builtin_memset(data, 0, sizeof data);
    configured = true;
  }
  void check(int t) const {
    if (!configured || rows[t] == 0 || column_bytes[t] == 0) __builtin_trap();
  }
  void load(int t, const void *from, int64_t stride) {
    check(t);
    __builtin_memset(data[t], 0, sizeof data[t]);
    for (int r = 0; r < rows[t]; ++r)
      __builtin_memcpy(data[t][r], static_cast<const uint8_t *>(from) + r * stride, column_bytes[t]);
  }
  void store(int t, void *to, int64_t stride) const {
    check(t);
    for (int r = 0; r < rows[t]; ++r)
      __builtin_memcpy(static_cast<uint8_t *>(to) + r * stride, data[t][r], column_bytes[t]);
  }
  static float number(const uint8_t *bf16) {
    uint16_t bits;
    __builtin_memcpy(&bits, bf16, 2);
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  void multiply(int sum, int a, int b) {
    check(sum), check(a), check(b);
    const int pairs = column_bytes[a] / 4, columns = column_bytes[sum] / 4;
    if (rows[sum] != rows[a] || column_bytes[sum] != column_bytes[b] || pairs != rows[b]) __builtin_trap();
    for (int m = 0; m < rows[sum]; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < pairs; ++k) {
        const float x = number(&data[a][m][4 * k]), y = number(&data[a][m][4 * k + 2]);
        for (int n = 0; n < columns; ++n) {
          even[n] = __builtin_fmaf(x, number(&data[b][k][4 * n]), even[n]);
          odd[n] = __builtin_fmaf(y, number(&data[b][k][4 * n + 2]), odd[n]);
        }
      }
      for (int n = 0; n < columns; ++n) {
        float value;
        __builtin_memcpy(&value, &data[sum][m][4 * n], 4);
        value += even[n] + odd[n];
        __builtin_memcpy(&data[sum][m][4 * n], &value, 4);
      }
    }
  }
};
thread_local EmulatedTiles emulated_tiles;

}  // namespace
}  // namespace microscale

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) microscale::emulated_tiles.configure(config)
#define _tile_release() (microscale::emulated_tiles.configured = false)
#define _tile_zero(t) __builtin_memset(microscale::emulated_tiles.data[t], 0, sizeof microscale::emulated_tiles.data[t])
#define _tile_loadd(t, from, stride) microscale::emulated_tiles.load(t, from, stride)
#define _tile_stored(t, to, stride) microscale::emulated_tiles.store(t, to, stride)
#define _tile_dpbf16ps(sum, a, b) microscale::emulated_tiles.multiply(sum, a, b)
