// Vectors and decoders for gemm.h without intrinsics: 16 columns x 1 k, one table entry a code.
#pragma once
#include "../layout.h"
#include "elements.h"
#include "lanes.h"

namespace microscale {
namespace {

struct Plain {
  using Operand = float;
  using Weights = f32x16;
  using Sum = f32x16;
  using Total = f32x16;
  static constexpr int kStep = 1, kUnits = 1, kRows = 2, kDecodedRows = 3, kPanels = 1;
  static constexpr int64_t kScratch = 16 << 10;
  static constexpr int few(int, int) { return 2; }
  static constexpr int at_once(int, int, int) { return 1; }

  static Sum no_sum() { return Sum{}; }
  static Total no_total() { return Total{}; }
  static Total load(const float *p) { return load_lanes<Total>(p); }
  template <class D>
  static void store(float *p, Total t) {
    store_lanes(p, t);
  }
  static void multiply(Sum &sum, const Weights &w, const Operand *x) { sum = sum + w * *x; }
  template <class D, bool kSpecial>
  static void add_block(Total &total, Sum sum, const f32x16 &scale) {
    total = total + sum * scale;
  }
};

struct FloatTable {
  uint32_t bits[256];
};
constexpr FloatTable floats_of(int format) {
  FloatTable t{};
  for (uint32_t code = 0; code < 256; ++code) {
    uint32_t bits = 0;
    switch (format) {
      case MS_MXFP4:
      case MS_NVFP4: bits = float_bits(kE2M1, code & 15); break;
      case MS_MXFP6_E2M3: bits = float_bits(kE2M3, code & 63); break;
      case MS_MXFP6_E3M2: bits = float_bits(kE3M2, code & 63); break;
      case MS_MXFP8_E5M2:
        bits = (code & 0x7c) == 0x7c ? (code & 0x80) << 24 | 0x7f800000u | (code & 3) << 21 : float_bits(kE5M2, code);
        break;
      case MS_MXINT8: {
        const uint32_t magnitude = code & 0x80 ? 256 - code : code;
        if (magnitude) {
          int top = 7;
          while (!(magnitude >> top)) --top;
          bits =
              (code & 0x80) << 24 | static_cast<uint32_t>(top - 6 + 127) << 23 | (magnitude << (23 - top) & 0x7fffff);
        }
        break;
      }
      default: bits = (code & 0x7f) == 0x7f ? (code & 0x80) << 24 | 0x7fc00000u : float_bits(kE4M3, code);
    }
    t.bits[code] = bits;
  }
  return t;
}

template <int kFormat_>
struct PlainDecoder {
  static constexpr int kFormat = kFormat_;
  static constexpr int kShift = 0;
  static constexpr int64_t kTileBytes = tile_bytes(kFormat);
  static constexpr int kBlocks = kFormat == MS_NVFP4 ? 2 : 1;
  static constexpr FloatTable kTable = floats_of(kFormat);
  static constexpr FloatTable kScales = floats_of(MS_FP8_BLOCK128);  // E4M3

  static uint32_t word(const uint8_t *tile, int i) {
    uint32_t v;
    __builtin_memcpy(&v, tile + 4 * i, 4);
    return v;
  }
  // Code of column n and k in the tile; see microscale.h.
  static uint32_t code(const uint8_t *tile, int n, int k) {
    const int parity = k % 2;
    if constexpr (traits(kFormat).bits == 8) return word(tile, k / 4 * 16 + n) >> (16 * parity + 8 * (k / 2 % 2)) & 255;
    const uint32_t low = word(tile, k / 8 * 16 + n) >> (16 * parity + 4 * (k / 2 % 4)) & 15;
    if constexpr (traits(kFormat).bits == 4) return low;
    return low | (word(tile, 64 + k / 16 * 16 + n) >> (16 * parity + 2 * (k / 2 % 8)) & 3) << 4;
  }

  static constexpr int kParts = 4;

  static constexpr int64_t kUnitCodes = 0, kUnitScales = 0;
  template <bool kSpecial, class Emit>
  void steps(const uint8_t *tile, int part, Emit emit) const {
    for (int k = part * (32 / kParts); k < (part + 1) * (32 / kParts); ++k) {
      u32x16 bits;
      for (int n = 0; n < kLanes; ++n) bits[n] = kTable.bits[code(tile, n, k)];
      emit(k, as_float(bits));
    }
  }

  // `scales` are the tile's (block FP8: the panel's).
  template <bool kSpecial>
  static f32x16 scale(const uint8_t *scales, int64_t tile, int block) {
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      float s;
      __builtin_memcpy(&s, scales + tile / 4 * 4, 4);
      return splat(s);
    }
    u32x16 bits;
    for (int n = 0; n < kLanes; ++n) {
      if constexpr (kFormat == MS_NVFP4) {
        bits[n] = kScales.bits[scales[16 * block + n]];
      } else {
        const uint32_t s = scales[n];
        bits[n] = s == 0 ? 0x00400000u : s == 255 ? 0x7fc00000u : s << 23;
      }
    }
    return as_float(bits);
  }
};

}  // namespace
}  // namespace microscale
