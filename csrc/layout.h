// The packed layout of microscale.h as arithmetic. Included by units of every ISA level: no function here may
// be emitted as a weak symbol, or the linker could keep a copy with instructions that the machine lacks.
// Hence `static` everywhere.
#pragma once
#include <stdint.h>

#include "microscale.h"

namespace microscale {

constexpr int64_t kHeaderBytes = sizeof(ms_header);
constexpr int64_t kAlignment = 64;     // of the buffer and of every panel in it
constexpr int64_t kPanelColumns = 16;  // of N
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
static constexpr int64_t scale_columns(int format, int64_t k) {
  return ceil_div(k, traits(format).block_columns);
}

// Packed form.
static constexpr int64_t tiles(int64_t k) { return ceil_div(k, kTileK); }
static constexpr int64_t panels(int64_t n) { return ceil_div(n, kPanelColumns); }
static constexpr int64_t tile_bytes(int format) { return kPanelColumns * kTileK * traits(format).bits / 8; }

// Bytes from a panel's start to its scales.
static constexpr int64_t scales_offset(int format, int64_t k) { return tiles(k) * tile_bytes(format); }

// Bytes of a panel's scales.
static constexpr int64_t panel_scale_bytes(int format, int64_t k) {
  const Traits &t = traits(format);
  if (t.blocks_per_tile == 0) return scale_columns(format, k) * t.scale_bytes;
  return tiles(k) * t.blocks_per_tile * kPanelColumns * t.scale_bytes;
}

static constexpr int64_t panel_bytes(int format, int64_t k) {
  return ceil_div(scales_offset(format, k) + panel_scale_bytes(format, k), kAlignment) * kAlignment;
}

// Fits in 64 bits only for sizes that packed_bytes() accepts.
static constexpr int64_t expert_bytes(int format, int64_t n, int64_t k) {
  return panels(n) * panel_bytes(format, k);
}

// Bytes of the whole buffer, or -1 for a format or size that cannot be. Takes any arguments.
static constexpr int64_t packed_bytes(int format, int64_t experts, int64_t n, int64_t k) {
  if (!valid_format(format) || !valid_size(experts) || !valid_size(n) || !valid_size(k)) return -1;
  constexpr int64_t most = PTRDIFF_MAX - kHeaderBytes;
  const int64_t panel = panel_bytes(format, k);
  if (panel > 0 && panels(n) > most / panel) return -1;
  const int64_t expert = panels(n) * panel;
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

// The first byte of one panel, from the buffer's start. `h` has passed header_of().
static inline int64_t panel_offset(const ms_header *h, int64_t expert, int64_t panel) {
  return kHeaderBytes + (expert * panels(h->n) + panel) * panel_bytes(h->format, h->k);
}

}  // namespace microscale
