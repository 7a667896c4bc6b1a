// One tile of codes, canonical <-> packed.
//
// A column's 32 codes of a tile are `bits` consecutive 32-bit words in canonical form, and each packed word
// holds codes of that column which were neighbours. So packing transposes words, four columns at a time, and
// then permutes bits within the lanes of vectors that every 64-bit machine has.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace microscale {
namespace {

static_assert(std::endian::native == std::endian::little, "canonical codes are little-endian streams");

// Four neighbouring columns; the compilers' own vectors, so that one source serves all machines.
using Lanes = uint32_t __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4;
constexpr int64_t kStep = kPanelColumns / kLanes;  // vectors from one packed word of a column to its next

// Words of four columns to vectors of one word each, or back.
void transpose(Lanes w[4]) {
  const Lanes a = __builtin_shufflevector(w[0], w[1], 0, 4, 1, 5);
  const Lanes b = __builtin_shufflevector(w[2], w[3], 0, 4, 1, 5);
  const Lanes c = __builtin_shufflevector(w[0], w[1], 2, 6, 3, 7);
  const Lanes d = __builtin_shufflevector(w[2], w[3], 2, 6, 3, 7);
  w[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  w[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  w[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  w[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

void load_rows(const uint8_t *in, int64_t stride, Lanes w[4]) {
  for (int64_t c = 0; c < kLanes; ++c) std::memcpy(&w[c], in + c * stride, sizeof(Lanes));
  transpose(w);
}

void store_rows(const Lanes words[4], uint8_t *out, int64_t stride) {
  Lanes w[4] = {words[0], words[1], words[2], words[3]};
  transpose(w);
  for (int64_t c = 0; c < kLanes; ++c) std::memcpy(out + c * stride, &w[c], sizeof(Lanes));
}

// Bytes 0 1 2 3 to 0 2 1 3; its own inverse.
Lanes swap_bytes(Lanes x) {
  const Lanes t = (x ^ (x >> 8)) & 0x0000ff00;
  return x ^ t ^ (t << 8);
}

// Nibbles 0 1 2 3 to 0 2 1 3 in both halves; its own inverse.
Lanes swap_nibbles(Lanes x) {
  const Lanes t = (x ^ (x >> 4)) & 0x00f000f0;
  return x ^ t ^ (t << 4);
}

// Four 6-bit codes in 24 bits to one a byte, and back.
Lanes spread(Lanes x) {
  x = (x & 0x00000fff) | (x & 0x00fff000) << 4;
  return (x & 0x003f003f) | (x & 0x0fc00fc0) << 2;
}
Lanes gather(Lanes x) {
  x = (x & 0x003f003f) | (x & 0x3f003f00) >> 2;
  return (x & 0x00000fff) | (x & 0x0fff0000) >> 4;
}

// The low nibbles of bytes 0 1 2 3 as nibbles 0 2 1 3 of 16 bits, and back.
Lanes join_low(Lanes x) {
  x &= 0x0f0f0f0f;
  return (x | x >> 12) & 0xffff;
}
Lanes split_low(Lanes x) { return (x | x << 12) & 0x0f0f0f0f; }

// Bits 4 and 5 of bytes 0 1 2 3: those of 0 and 2 in bits 0 to 3, those of 1 and 3 in bits 8 to 11, and back.
Lanes join_high(Lanes x) {
  x = x >> 4 & 0x03030303;
  return (x | x >> 14) & 0x0f0f;
}
Lanes split_high(Lanes x) { return ((x | x << 14) & 0x03030303) << 4; }

// Finds codes that are infinite or NaN: (byte & mask) + carry has its top bit set for these alone.
struct Bad {
  uint32_t mask, carry;
};

Bad bad_codes(int format) {
  if (format == MS_MXFP8_E4M3 || format == MS_FP8_BLOCK128) return {0x7f7f7f7f, 0x01010101};
  if (format == MS_MXFP8_E5M2) return {0x7c7c7c7c, 0x04040404};
  return {0, 0};
}

// Packs one tile of four columns whose rows are `stride` bytes apart. Sets a byte's top bit in `found` for a
// bad code.
template <int Bits>
void pack_tile(const uint8_t *in, int64_t stride, Lanes *out, Bad bad, Lanes &found) {
  if constexpr (Bits == 6) {
    Lanes w[6];
    load_rows(in + 8, stride, w + 2);  // words 2 to 5
    Lanes first[4];
    load_rows(in, stride, first);
    w[0] = first[0];
    w[1] = first[1];
    for (int half = 0; half < 2; ++half) {  // 16 codes in three words
      const Lanes *x = w + 3 * half;
      const Lanes a = spread(x[0] & 0xffffff), b = spread((x[0] >> 24 | x[1] << 8) & 0xffffff);
      const Lanes c = spread((x[1] >> 16 | x[2] << 16) & 0xffffff), d = spread(x[2] >> 8);
      out[2 * half * kStep] = swap_bytes(join_low(a) | join_low(b) << 16);
      out[(2 * half + 1) * kStep] = swap_bytes(join_low(c) | join_low(d) << 16);
      const Lanes high = join_high(a) | join_high(b) << 4 | join_high(c) << 16 | join_high(d) << 20;
      out[(4 + half) * kStep] = swap_bytes(high);
    }
  } else {
    for (int q = 0; q < Bits; q += 4) {
      Lanes w[4];
      load_rows(in + 4 * q, stride, w);
      for (int i = 0; i < 4; ++i) {
        if constexpr (Bits == 8) found |= (w[i] & bad.mask) + bad.carry;
        if constexpr (Bits == 4) w[i] = swap_nibbles(w[i]);
        out[(q + i) * kStep] = swap_bytes(w[i]);
      }
    }
  }
}

// The inverse of pack_tile.
template <int Bits>
void unpack_tile(const Lanes *in, uint8_t *out, int64_t stride) {
  if constexpr (Bits == 6) {
    Lanes w[6];
    for (int half = 0; half < 2; ++half) {
      const Lanes first = swap_bytes(in[2 * half * kStep]), second = swap_bytes(in[(2 * half + 1) * kStep]);
      const Lanes high = swap_bytes(in[(4 + half) * kStep]);
      const Lanes a = gather(split_low(first & 0xffff) | split_high(high & 0x0f0f));
      const Lanes b = gather(split_low(first >> 16) | split_high(high >> 4 & 0x0f0f));
      const Lanes c = gather(split_low(second & 0xffff) | split_high(high >> 16 & 0x0f0f));
      const Lanes d = gather(split_low(second >> 16) | split_high(high >> 20));
      w[3 * half] = a | b << 24;
      w[3 * half + 1] = b >> 8 | c << 16;
      w[3 * half + 2] = c >> 16 | d << 8;
    }
    store_rows(w, out, stride);
    store_rows(w + 2, out + 8, stride);  // words 2 and 3 once more
  } else {
    for (int q = 0; q < Bits; q += 4) {
      Lanes w[4];
      for (int i = 0; i < 4; ++i) {
        w[i] = swap_bytes(in[(q + i) * kStep]);
        if constexpr (Bits == 4) w[i] = swap_nibbles(w[i]);
      }
      store_rows(w, out + 4 * q, stride);
    }
  }
}

}  // namespace
}  // namespace microscale
