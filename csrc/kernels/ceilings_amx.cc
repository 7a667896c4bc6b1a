// AMX with bfloat16 tiles: products of the same two operand tiles into three sums.
// More registers would take longer where somebody else uses the core (bench/amx_tiles.cc), and no ceiling may be lower
// than what is possible.
#include "ceilings_avx512.h"

namespace microscale {
namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Plain loads: these processors fetch ahead by themselves, and prefetches take a few per cent of the rate.
uint64_t read(const uint8_t *from, int64_t bytes) {
  __m512i seen[8];
  for (__m512i &v : seen) v = _mm512_setzero_si512();
  for (int64_t i = 0; i < bytes; i += 512)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) seen[j] = _mm512_xor_si512(seen[j], _mm512_load_si512(from + i + 64 * j));
  for (int j = 1; j < 8; ++j) seen[0] = _mm512_xor_si512(seen[0], seen[j]);
  return static_cast<uint64_t>(_mm512_reduce_or_epi64(seen[0]));
}

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
  // Tiles of 16 lines of 64 bytes that overlap: 1 KB of numbers is enough for two that differ.
  _tile_loadd(4, kOperands.bf16, 48);
  _tile_loadd(5, kOperands.bf16 + 16, 48);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
  }
  _tile_stored(0, sums, 64);
  __asm__ volatile("" ::"r"(sums) : "memory");
  _tile_release();
  for (const float v : sums) *sink += v;
  return rounds * 3 * (16 * 16 * 32 * 2);
}

}  // namespace

extern const Ceilings amx_ceilings = {read, multiply};

}  // namespace microscale
