// A canonical tensor and a guarded buffer, for the tests of packing.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "microscale.h"

namespace {

using Bytes = std::vector<uint8_t>;

// Written out once more and not taken from layout.h, which is under test too.
struct Facts {
  int bits, tile, rows, columns, scale;
};
constexpr Facts kFacts[MS_FORMATS] = {{4, 256, 1, 32, 1}, {6, 384, 1, 32, 1},   {6, 384, 1, 32, 1},
                                      {8, 512, 1, 32, 1}, {8, 512, 1, 32, 1},   {8, 512, 1, 32, 1},
                                      {4, 256, 1, 16, 1}, {8, 512, 128, 128, 4}};
constexpr int64_t kCanary = 64;

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A canonical tensor of random bits, with zeros beyond the last code of a row.
struct Tensor {
  int format;
  int64_t e, n, k, stride, blocks_n, blocks_k;
  Bytes codes, scales;

  Tensor(int f, int64_t experts, int64_t rows, int64_t columns) : format(f), e(experts), n(rows), k(columns) {
    const Facts &facts = kFacts[f];
    stride = up(k * facts.bits, 8), blocks_n = up(n, facts.rows), blocks_k = up(k, facts.columns);
    codes.resize(static_cast<size_t>(e * n * stride));
    scales.resize(static_cast<size_t>(e * blocks_n * blocks_k * facts.scale));
  }
  void randomize(unsigned seed) {
    std::mt19937 random(seed);
    for (auto &byte : codes) byte = static_cast<uint8_t>(random());
    for (auto &byte : scales) byte = static_cast<uint8_t>(random());
    const int used = static_cast<int>(k * kFacts[format].bits % 8);
    for (int64_t row = 0; used != 0 && row < e * n; ++row) {
      codes[static_cast<size_t>((row + 1) * stride - 1)] &= static_cast<uint8_t>((1 << used) - 1);
    }
  }
  uint8_t *row(int64_t expert, int64_t column) { return codes.data() + (expert * n + column) * stride; }
  uint8_t *scale(int64_t expert, int64_t r, int64_t b) {
    return scales.data() + ((expert * blocks_n + r) * blocks_k + b) * kFacts[format].scale;
  }
};

// A buffer at 64 bytes between canaries, filled with garbage.
struct Buffer {
  explicit Buffer(int64_t size, uint8_t fill = 0xa5) : bytes(size) {
    const auto all = static_cast<size_t>(up(size, 64) * 64 + 2 * kCanary);
    memory = static_cast<uint8_t *>(std::aligned_alloc(64, all));
    std::memset(memory, 0xc7, all);
    std::memset(data(), fill, static_cast<size_t>(size));
  }
  ~Buffer() { std::free(memory); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  uint8_t *data() const { return memory + kCanary; }
  bool intact() const {
    for (int64_t i = 0; i < kCanary; ++i) {
      if (memory[i] != 0xc7 || memory[kCanary + bytes + i] != 0xc7) return false;
    }
    return true;
  }
  int64_t bytes;
  uint8_t *memory;
};

// Canonical: code k of a row, a little-endian stream of bits.
inline int canonical_code(const uint8_t *row, int bits, int64_t k) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = k * bits + b;
    code |= (row[bit / 8] >> (bit % 8) & 1) << b;
  }
  return code;
}

#define SHAPE(t) "format %d [%ld, %ld, %ld]", (t).format, long((t).e), long((t).n), long((t).k)

inline int64_t packed_bytes(const Tensor &t) {
  const Facts &facts = kFacts[t.format];
  const int64_t tiles = up(t.k, 32);
  const int64_t scales = t.format == MS_FP8_BLOCK128 ? 4 * up(t.k, 128) : tiles * (32 / facts.columns) * 16;
  const auto group = [&](int64_t panels) { return up(panels * (tiles * facts.tile + scales), 64) * 64; };
  const int64_t panels = up(t.n, 16);
  return 64 + t.e * (panels / 4 * group(4) + group(panels % 4));
}

inline int pack(const Tensor &t, void *out, int threads = 2) {
  return ms_pack(t.format, t.e, t.n, t.k, t.codes.data(), t.scales.data(), out, threads);
}

}  // namespace
