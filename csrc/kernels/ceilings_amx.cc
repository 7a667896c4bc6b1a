// AMX with bfloat16 tiles: two by two products from four operand tiles, as the kernels for many rows.
#include "ceilings_avx512.h"

namespace microscale {
namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

int64_t multiply(int64_t rounds, float *sink) {
  Config c;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
  alignas(64) float sums[256];
  // The instructions tell the compiler of the first bytes of their operands at most.
  __asm__ volatile("" ::"r"(&c) : "memory");
  _tile_loadconfig(&c);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  // Tiles of 16 lines of 64 bytes that overlap: 1 KB of numbers is enough for four that differ.
  _tile_loadd(4, kOperands.bf16, 48);
  _tile_loadd(5, kOperands.bf16 + 16, 48);
  _tile_loadd(6, kOperands.bf16 + 32, 48);
  _tile_loadd(7, kOperands.bf16 + 48, 48);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  __asm__ volatile("" ::"r"(sums) : "memory");
  _tile_release();
  for (const float v : sums) *sink += v;
  return rounds * 4 * (16 * 16 * 32 * 2);
}

}  // namespace

extern const Ceilings amx_ceilings = {read512, multiply};

}  // namespace microscale
