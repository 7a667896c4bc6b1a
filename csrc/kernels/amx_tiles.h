// What AMX tiles hold, and how they are loaded, multiplied and stored.
#pragma once
#include <immintrin.h>

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

// How tiles are used, by R, the tiles of 16 rows that are multiplied at a time:
//   1: sums of panel p are tile p (up to four panels), rows tile 4, weights tiles 5 to 7 in turn;
//   2: sums of row tile r and panel p (up to two) are tile 2 r + p, rows tiles 4 and 5, weights tiles 6 and 7;
//   3: the same, six sums, with rows in tile 6 and weights in tile 7.
//
// `rows` of a tile, at most 16; only R = 1 goes with fewer than 16. Loading a configuration takes as long as 16
// products.
inline void configure(int64_t rows) {
  Config c;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
  for (int i = 0; i < 5; ++i) c.rows[i] = static_cast<uint8_t>(rows);  // sums, if there are four, and rows
  __asm__ volatile("" ::"r"(&c) : "memory");  // the instruction's own operand names its first bytes only
  _tile_loadconfig(&c);
}

template <int R>
inline void zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (R == 3) _tile_zero(4);
  if constexpr (R == 3) _tile_zero(5);
}

// Sums to [16 R][16 P] floats, `stride` bytes between rows.
template <int R, int P>
inline void store(float *out, int64_t stride) {
  float *second = out + 4 * stride, *third = out + 8 * stride;  // 16 rows on, and 32
  _tile_stored(0, out, stride);
  if constexpr (P > 1) _tile_stored(1, out + 16, stride);
  if constexpr (R == 1 && P > 2) _tile_stored(2, out + 32, stride);
  if constexpr (R == 1 && P > 3) _tile_stored(3, out + 48, stride);
  if constexpr (R > 1) _tile_stored(2, second, stride);
  if constexpr (R > 1 && P > 1) _tile_stored(3, second + 16, stride);
  if constexpr (R > 2) _tile_stored(4, third, stride);
  if constexpr (R > 2 && P > 1) _tile_stored(5, third + 16, stride);
  fence();
}

// R tiles of rows, the first of them row `row` of the product.
template <int R>
struct Rows {
  const uint8_t *x;  // operands
  int64_t step;      // bytes from a tile of K to the next
  int64_t next;      // bytes from a tile of rows to the next
  int64_t m;         // up to 16 R
  float *out;
  int64_t stride;  // of out, bytes

  Rows(const Product &a, int64_t row, float *to) {
    const int64_t left = a.m - row;
    m = left < 16 * R ? left : 16 * R;
    next = kTile * tiles(a.k);
    x = static_cast<const uint8_t *>(a.rows[0]) + row / 16 * next;
    step = a.m < 16 ? 64 * a.m : kTile;
    out = to + row * a.stride;
    stride = 4 * a.stride;
  }
  const uint8_t *at(int r, int64_t tile) const { return x + r * next + tile * step; }
};

// One step of up to two tiles of rows: `begin` loads them, and `panel` multiplies them by panel p's weights; p is a
// constant wherever this is inlined.
template <int R>
inline void begin(const Rows<R> &r, int64_t tile) {
  if constexpr (R < 3) _tile_loadd(4, r.at(0, tile), 64);
  if constexpr (R == 2) _tile_loadd(5, r.at(1, tile), 64);
}
template <int R>
inline __attribute__((always_inline)) void panel(int p, const uint8_t *w) {
  if constexpr (R == 2) {
    if (p == 0) {
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    } else {
      _tile_loadd(7, w, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else if constexpr (R == 1) {
    if (p == 0) {
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(0, 4, 6);
    } else if (p == 1) {
      _tile_loadd(7, w, 64);
      _tile_dpbf16ps(1, 4, 7);
    } else if (p == 2) {
      _tile_loadd(5, w, 64);
      _tile_dpbf16ps(2, 4, 5);
    } else {
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
}

// One step of three tiles of rows, in two halves between which there may be other work: seven loads, of which only the
// rows' come from beyond L1, for six products.
template <int P>
inline void first_half(const Rows<3> &r, int64_t tile, const uint8_t *w) {
  _tile_loadd(6, r.at(0, tile), 64);
  _tile_loadd(7, w, 64);
  _tile_dpbf16ps(0, 6, 7);
  if constexpr (P == 2) {
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(6, r.at(1, tile), 64);
    _tile_dpbf16ps(3, 6, 7);
  } else {
    _tile_loadd(6, r.at(1, tile), 64);
    _tile_dpbf16ps(2, 6, 7);
  }
}
template <int P>
inline void second_half(const Rows<3> &r, int64_t tile, const uint8_t *w) {
  if constexpr (P == 2) {
    _tile_loadd(7, w, 64);
    _tile_dpbf16ps(2, 6, 7);
  }
  _tile_loadd(6, r.at(2, tile), 64);
  _tile_dpbf16ps(4, 6, 7);
  if constexpr (P == 2) {
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(5, 6, 7);
  }
}

}  // namespace
}  // namespace microscale
