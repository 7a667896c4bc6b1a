// The packed layout of microscale.h as arithmetic. Included by units of every ISA level: no function here may
// be emitted as a weak symbol, or the linker could keep a copy with instructions that the machine lacks.
// Hence `static` everywhere.
#pragma once
#include <stdint.h>

#include "microscale.h"

namespace microscale {

constexpr int64_t kHeaderBytes = sizeof(ms_header);
constexpr int64_t kAlignment = 64;     // of the buffer and of every group in it
constexpr int64_t kPanelColumns = 16;  // of N
constexpr int64_t kGroupPanels = 4;
constexpr int64_t kTileK = 32;
constexpr int64_t kMaxSize = int64_t{1} << 40;  // of experts, n, k: above any tensor; sums cannot overflow
static_assert(kHeaderBytes == 64);

enum ScaleKind { kE8M0, kE4M3, kFloat32 };

struct Traits {
  int bits;             // of a code
  int scale;            // a ScaleKind
  int scale_bytes;      // of one scale
  int block_rows;       // of N that share a scale
  int block_columns;    // of K that share a scale
  int blocks_per_tile;  // along K, in one column; 0 where a block covers several tiles
};

constexpr Traits kTraits[MS_FORMATS] = {
    {4, kE8M0, 1, 1, 32, 1},        // MS_MXFP4
    {6, kE8M0, 1, 1, 32, 1},        // MS_MXFP6_E2M3
    {6, kE8M0, 1, 1, 32, 1},        // MS_MXFP6_E3M2
    {8, kE8M0, 1, 1, 32, 1},        // MS_MXFP8_E4M3
    {8, kE8M0, 1, 1, 32, 1},        // MS_MXFP8_E5M2
    {8, kE8M0, 1, 1, 32, 1},        // MS_MXINT8
    {4, kE4M3, 1, 1, 16, 2},        // MS_NVFP4
    {8, kFloat32, 4, 128, 128, 0},  // MS_FP8_BLOCK128
};

static constexpr bool valid_format(int format) { return format >= 0 && format < MS_FORMATS; }
static constexpr bool valid_size(int64_t size) { return size >= 0 && size <= kMaxSize; }

// The functions below take a valid format and valid sizes.
static constexpr const Traits &traits(int format) { return kTraits[format]; }
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Canonical form.
static constexpr int64_t row_bytes(int format, int64_t k) { return ceil_div(k * traits(format).bits, 8); }
static constexpr int64_t scale_rows(int format, int64_t n) { return ceil_div(n, traits(format).block_rows); }
static constexpr int64_t scale_columns(int format, int64_t k) { return ceil_div(k, traits(format).block_columns); }

// Packed form.
static constexpr int64_t tiles(int64_t k) { return ceil_div(k, kTileK); }
static constexpr int64_t panels(int64_t n) { return ceil_div(n, kPanelColumns); }

// Rows of operands that share a tile where `rows` rows are multiplied together: as few tiles of at most 16 as hold them
// all, equally high, since what a tile costs depends on its height.
static constexpr int64_t tile_rows(int64_t rows) { return rows > 16 ? ceil_div(rows, ceil_div(rows, 16)) : rows; }
static constexpr int64_t tile_bytes(int format) { return kPanelColumns * kTileK * traits(format).bits / 8; }

// Byte scales of one panel and tile; none in block FP8.
static constexpr int64_t tile_scale_bytes(int format) {
  return traits(format).blocks_per_tile * kPanelColumns * traits(format).scale_bytes;
}

// A panel's scales that cover several tiles (block FP8).
static constexpr int64_t panel_scale_bytes(int format, int64_t k) {
  return traits(format).blocks_per_tile == 0 ? scale_columns(format, k) * traits(format).scale_bytes : 0;
}

// A group of `count` panels: bytes from one tile to the next, and of the whole.
static constexpr int64_t tile_step(int format, int64_t count) {
  return count * (tile_bytes(format) + tile_scale_bytes(format));
}
static constexpr int64_t group_bytes(int format, int64_t k, int64_t count) {
  const int64_t bytes = tiles(k) * tile_step(format, count) + count * panel_scale_bytes(format, k);
  return ceil_div(bytes, kAlignment) * kAlignment;
}

// Where a panel lies in its expert, in bytes.
struct PanelPlace {
  int64_t codes;       // its codes of tile 0
  int64_t scales;      // its scales of tile 0
  int64_t step;        // from a tile's codes to the next tile's
  int64_t scale_step;  // the same of scales; 0 where they cover several tiles
  int64_t count;       // panels in its group
};
static constexpr PanelPlace panel_place(int format, int64_t n, int64_t k, int64_t panel) {
  const int64_t group = panel / kGroupPanels, within = panel % kGroupPanels, left = panels(n) - group * kGroupPanels;
  const int64_t count = left < kGroupPanels ? left : kGroupPanels, step = tile_step(format, count);
  const int64_t start = group * group_bytes(format, k, kGroupPanels);
  const bool bytes = traits(format).blocks_per_tile != 0;
  const int64_t scales = bytes ? count * tile_bytes(format) + within * tile_scale_bytes(format)
                               : tiles(k) * step + within * panel_scale_bytes(format, k);
  return {start + within * tile_bytes(format), start + scales, step, bytes ? step : 0, count};
}

// Fits in 64 bits only for sizes that packed_bytes() accepts.
static constexpr int64_t expert_bytes(int format, int64_t n, int64_t k) {
  const int64_t rest = panels(n) % kGroupPanels;
  return panels(n) / kGroupPanels * group_bytes(format, k, kGroupPanels) + (rest ? group_bytes(format, k, rest) : 0);
}

// Bytes of the whole buffer, or -1 for a format or size that cannot be. Takes any arguments.
static constexpr int64_t packed_bytes(int format, int64_t experts, int64_t n, int64_t k) {
  if (!valid_format(format) || !valid_size(experts) || !valid_size(n) || !valid_size(k)) return -1;
  constexpr int64_t most = PTRDIFF_MAX - kHeaderBytes;
  const int64_t group = group_bytes(format, k, kGroupPanels);
  if (group > 0 && panels(n) / kGroupPanels + 1 > most / group) return -1;
  const int64_t expert = expert_bytes(format, n, k);
  if (expert > 0 && experts > most / expert) return -1;
  return kHeaderBytes + experts * expert;
}

// The header of a packed buffer, or null where it is not one: null or unaligned pointer, foreign magic,
// unknown flags, sizes that do not fit each other. At least kHeaderBytes must be readable.
static inline const ms_header *header_of(const void *packed) {
  if (packed == nullptr || reinterpret_cast<uintptr_t>(packed) % kAlignment != 0) return nullptr;
  const ms_header *h = static_cast<const ms_header *>(packed);
  if (h->magic != MS_MAGIC || (h->flags & ~MS_SPECIAL) != 0) return nullptr;
  const int64_t bytes = packed_bytes(h->format, h->experts, h->n, h->k);
  return bytes >= 0 && bytes == h->bytes ? h : nullptr;
}

// The first byte of one expert, from the buffer's start. `h` has passed header_of().
static inline int64_t expert_offset(const ms_header *h, int64_t expert) {
  return kHeaderBytes + expert * expert_bytes(h->format, h->n, h->k);
}

}  // namespace microscale
