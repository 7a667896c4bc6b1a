// What AMX tiles hold, and how they are loaded, multiplied and stored.
#pragma once
#include <immintrin.h>

#include "inline.h"
#include "table.h"
#include "../layout.h"

namespace microscale {
namespace {

constexpr int64_t kTile = 1024;  // bytes: of weights 16 pairs of k times 16 columns, of operands 16 rows times 32 k

// The tile instructions tell the compiler nothing of the memory they touch.
inline void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// How tiles are used for R tiles of 16 rows times P panels, up to four sums: the sum of row tile r and panel p is tile
// r P + p, rows are in tile 4 and weights in tile 5, loaded again for every product that needs others. Tiles 6 and 7
// are never touched: where both threads of a core work, loads and products wait for each other the more, the more
// tiles have been written since the configuration. With all eight they take twice as long as with six. See docs/cpu.md.
//
// `rows` of a tile, at most 16. Loading a configuration takes as long as ten products.
inline void configure(int64_t rows) {
  Config c;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
  for (int i = 0; i < 5; ++i) c.rows[i] = static_cast<uint8_t>(rows);  // sums and rows
  __asm__ volatile("" ::"r"(&c) : "memory");  // the instruction's own operand names its first bytes only
  _tile_loadconfig(&c);
}

// The instructions name their tiles in their text.
#define MS_EACH_TILE(f) f(0) f(1) f(2) f(3) f(4) f(5)
template <int kTileNumber>
MS_INLINE void load_tile(const uint8_t *from) {
#define MS_LOAD(t) \
  if constexpr (kTileNumber == t) _tile_loadd(t, from, 64);
  MS_EACH_TILE(MS_LOAD)
#undef MS_LOAD
}
template <int kTileNumber>
inline void store_tile(float *to, int64_t stride) {
#define MS_STORE(t) \
  if constexpr (kTileNumber == t) _tile_stored(t, to, stride);
  MS_EACH_TILE(MS_STORE)
#undef MS_STORE
}
template <int kTileNumber>
inline void zero_tile() {
#define MS_ZERO(t) \
  if constexpr (kTileNumber == t) _tile_zero(t);
  MS_EACH_TILE(MS_ZERO)
#undef MS_ZERO
}
template <int kSum>
MS_INLINE void multiply_tiles() {
  static_assert(kSum < 4);
#define MS_MULTIPLY(t) \
  if constexpr (kSum == t) _tile_dpbf16ps(t, 4, 5);
  MS_EACH_TILE(MS_MULTIPLY)
#undef MS_MULTIPLY
}
#undef MS_EACH_TILE

template <int kSums>
inline void zero() {
  if constexpr (kSums > 0) {
    zero<kSums - 1>();
    zero_tile<kSums - 1>();
  }
}

// Sums to [rows R][16 P] floats of tiles of `rows` rows, `stride` bytes between rows.
template <int R, int P, int kFrom = 0>
inline void store(float *out, int64_t rows, int64_t stride) {
  if constexpr (kFrom < R * P) {
    store_tile<kFrom>(out + kFrom / P * rows * (stride / 4) + kFrom % P * 16, stride);
    store<R, P, kFrom + 1>(out, rows, stride);
  } else {
    fence();
  }
}

// R tiles of rows, the first of them tile `first` of the product.
template <int R>
struct Rows {
  const uint8_t *x;  // operands
  int64_t step;      // bytes from a tile of K to the next
  int64_t next;      // bytes from a tile of rows to the next
  int64_t each;      // rows of a tile
  int64_t m;         // up to R times as many
  float *out;
  int64_t stride;  // of out, bytes

  Rows(const Product &a, int64_t first, float *to) {
    each = tile_rows(a.m);
    const int64_t left = a.m - first * each;
    m = left < R * each ? left : R * each;
    step = 64 * each;
    next = step * tiles(a.k);
    x = static_cast<const uint8_t *>(a.rows[0]) + first * next;
    out = to + first * each * a.stride;
    stride = 4 * a.stride;
  }
  const uint8_t *at(int r, int64_t tile) const { return x + r * next + tile * step; }
};

// A step's products, R P of them, go forth and back through the panels, so that neighbours share their weights or their
// rows. The panels' weights lie one after the other.
template <int P>
constexpr int panel_of(int product) {
  return product / P % 2 ? P - 1 - product % P : product % P;
}
// What product i needs and the one before it had not.
template <int R, int P, int i>
MS_INLINE void loads_of_step(const Rows<R> &rows, int64_t tile, const uint8_t *weights) {
  if constexpr (i % P == 0) load_tile<4>(rows.at(i / P, tile));
  if constexpr (i == 0 || panel_of<P>(i) != panel_of<P>(i - 1)) load_tile<5>(weights + panel_of<P>(i) * kTile);
}

}  // namespace
}  // namespace microscale
