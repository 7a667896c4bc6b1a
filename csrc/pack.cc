// Canonical codes and scales <-> the packed layout of microscale.h, one panel of 16 columns a unit.
#include <atomic>
#include <cstring>

#include "layout.h"
#include "pages.h"
#include "parallel.h"
#include "tile_codes.h"

namespace microscale {
namespace {

// Tiles after which packing turns to the next four columns: the panel's lines are then still in the L1 cache.
constexpr int64_t kRun = 8;

// Packs a panel's codes. `stride` is the bytes of a row, `columns` how many of the panel's exist, `step` the vectors
// from a tile to the next. Returns whether a code is bad.
template <int Bits>
bool pack_codes(const uint8_t *rows, int64_t stride, int64_t columns, Lanes *panel, int64_t step, Bad bad) {
  constexpr int64_t bytes = 4 * Bits;  // of a row in one tile
  const int64_t whole = stride / bytes, all = ceil_div(stride, bytes);
  Lanes found = {};
  for (int64_t begin = 0; begin < all; begin += kRun) {
    const int64_t end = begin + kRun < all ? begin + kRun : all;
    for (int64_t c = 0; c < kPanelColumns; c += kLanes) {
      const uint8_t *in = rows + c * stride;
      Lanes *out = panel + c / kLanes;
      const int64_t direct = columns - c < kLanes ? begin : end < whole ? end : whole;
      for (int64_t t = begin; t < direct; ++t) {
        pack_tile<Bits>(in + t * bytes, stride, out + t * step, bad, found);
      }
      for (int64_t t = direct; t < end; ++t) {  // ragged in N or K
        uint8_t copy[4 * kLanes * Bits] = {};
        const int64_t length = t < whole ? bytes : stride - t * bytes;
        for (int64_t i = 0; i < kLanes && c + i < columns; ++i) {
          std::memcpy(copy + i * bytes, in + i * stride + t * bytes, static_cast<size_t>(length));
        }
        pack_tile<Bits>(copy, bytes, out + t * step, bad, found);
      }
    }
  }
  return ((found[0] | found[1] | found[2] | found[3]) & 0x80808080) != 0;
}

// The inverse of pack_codes.
template <int Bits>
void unpack_codes(const Lanes *panel, int64_t step, int64_t stride, int64_t columns, uint8_t *rows) {
  constexpr int64_t bytes = 4 * Bits;
  const int64_t whole = stride / bytes, all = ceil_div(stride, bytes);
  for (int64_t begin = 0; begin < all; begin += kRun) {
    const int64_t end = begin + kRun < all ? begin + kRun : all;
    for (int64_t c = 0; c < columns; c += kLanes) {
      uint8_t *out = rows + c * stride;
      const Lanes *in = panel + c / kLanes;
      const int64_t direct = columns - c < kLanes ? begin : end < whole ? end : whole;
      for (int64_t t = begin; t < direct; ++t) unpack_tile<Bits>(in + t * step, out + t * bytes, stride);
      for (int64_t t = direct; t < end; ++t) {
        uint8_t copy[4 * kLanes * Bits];
        unpack_tile<Bits>(in + t * step, copy, bytes);
        const int64_t length = t < whole ? bytes : stride - t * bytes;
        for (int64_t i = 0; i < kLanes && c + i < columns; ++i) {
          std::memcpy(out + i * stride + t * bytes, copy + i * bytes, static_cast<size_t>(length));
        }
      }
    }
  }
}

// Whether the block of one column in one tile has a number other than zero, from its packed words. Only
// magnitude bits count, except in the integer -128, which has none and is a number.
bool any_magnitude(int format, const uint8_t *words) {
  const int bits = traits(format).bits;
  uint32_t low = 0, high = 0;
  for (int q = 0; q < bits; ++q) {
    uint32_t word;
    std::memcpy(&word, words + q * 4 * kPanelColumns, 4);
    (q < 4 || bits == 8 ? low : high) |= word;
  }
  if (bits == 4) return (low & 0x77777777) != 0;
  if (bits == 6) return (low | (high & 0x55555555)) != 0;
  return (format == MS_MXINT8 ? low : low & 0x7f7f7f7f) != 0;
}

bool special_e8m0(int format, const uint8_t *codes, const uint8_t *scales, int64_t step, int64_t tiles) {
  constexpr uint8_t least = 32, most = 222, nan = 255;
  for (int64_t t = 0; t < tiles; ++t, codes += step, scales += step) {
    uint8_t outside = 0;
    for (int64_t c = 0; c < kPanelColumns; ++c) outside |= static_cast<uint8_t>(scales[c] - least) > most - least;
    if (outside == 0) continue;
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      if (scales[c] >= least && scales[c] <= most) continue;
      if (scales[c] == nan || any_magnitude(format, codes + 4 * c)) return true;
    }
  }
  return false;
}

// Negative scales too: only the slower path heeds their sign.
bool special_e4m3(const uint8_t *scales, int64_t step, int64_t tiles) {
  uint8_t found = 0;
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t i = 0; i < tile_scale_bytes(MS_NVFP4); ++i) found |= scales[t * step + i] >= 0x7f;
  return found != 0;
}

bool special_float32(const uint8_t *scales, int64_t count) {
  constexpr uint32_t least = (127 - 60) << 23, most = (127 + 60) << 23;  // infinity and NaN are above
  for (int64_t i = 0; i < count; ++i) {
    uint32_t magnitude;
    std::memcpy(&magnitude, scales + 4 * i, 4);
    magnitude &= 0x7fffffff;
    if (magnitude != 0 && (magnitude < least || magnitude > most)) return true;
  }
  return false;
}

// One panel: where it lies in both forms.
struct Place {
  int64_t expert, panel, column, columns;  // `columns` of the panel exist, from `column` on

  Place(int64_t n, int64_t unit) {
    expert = unit / panels(n);
    panel = unit % panels(n);
    column = panel * kPanelColumns;
    columns = n - column < kPanelColumns ? n - column : kPanelColumns;
  }
  int64_t codes(int format, int64_t n, int64_t k) const { return (expert * n + column) * row_bytes(format, k); }
  int64_t scales(int format, int64_t n, int64_t k) const {
    const int64_t row = expert * scale_rows(format, n) + column / traits(format).block_rows;
    return row * scale_columns(format, k) * traits(format).scale_bytes;
  }
};

struct Packing {
  const ms_header *header;
  const uint8_t *codes, *scales;
  uint8_t *packed;
  std::atomic<bool> special{false}, dirty{false};
};

void pack_panel(void *context, int64_t unit, int) {
  Packing &job = *static_cast<Packing *>(context);
  const int format = job.header->format;
  const int64_t n = job.header->n, k = job.header->k, stride = row_bytes(format, k);
  const Place at(n, unit);
  const uint8_t *rows = job.codes + at.codes(format, n, k), *in = job.scales + at.scales(format, n, k);
  uint8_t *expert = job.packed + expert_offset(job.header, at.expert);
  const PanelPlace place = panel_place(format, n, k, at.panel);
  uint8_t *packed_codes = expert + place.codes, *out = expert + place.scales;
  Lanes *panel = reinterpret_cast<Lanes *>(packed_codes);

  const Bad bad = bad_codes(format);
  const int bits = traits(format).bits;
  const int64_t step = place.step / static_cast<int64_t>(sizeof(Lanes));
  if (bits == 4) pack_codes<4>(rows, stride, at.columns, panel, step, bad);
  if (bits == 6) pack_codes<6>(rows, stride, at.columns, panel, step, bad);
  bool special = false;
  if (bits == 8) special = pack_codes<8>(rows, stride, at.columns, panel, step, bad);

  const int64_t blocks = scale_columns(format, k), each = traits(format).blocks_per_tile;
  if (each == 0) {
    std::memcpy(out, in, static_cast<size_t>(4 * blocks));
    special |= special_float32(out, blocks);
  } else {
    for (int64_t t = 0; t < tiles(k); ++t) {
      uint8_t *to = out + t * place.step;
      for (int64_t b = 0; b < each; ++b)
        for (int64_t c = 0; c < kPanelColumns; ++c)
          to[b * kPanelColumns + c] =
              c < at.columns && each * t + b < blocks ? in[c * blocks + each * t + b] : uint8_t{0};
    }
    special |= traits(format).scale == kE4M3 ? special_e4m3(out, place.step, tiles(k))
                                             : special_e8m0(format, packed_codes, out, place.step, tiles(k));
  }
  if (special) job.special.store(true, std::memory_order_relaxed);

  // The group's padding belongs to its last panel.
  if (at.panel % kGroupPanels == place.count - 1) {
    const int64_t start = at.panel / kGroupPanels * group_bytes(format, k, kGroupPanels);
    const int64_t used = tiles(k) * place.step + place.count * panel_scale_bytes(format, k);
    std::memset(expert + start + used, 0, static_cast<size_t>(group_bytes(format, k, place.count) - used));
  }

  // What the last byte of a row has beyond its codes cannot be kept, so it must be zero.
  if (const int used = static_cast<int>(k * bits % 8); used != 0) {
    uint32_t beyond = 0;
    for (int64_t c = 0; c < at.columns; ++c) beyond |= rows[(c + 1) * stride - 1];
    if (beyond >> used != 0) job.dirty.store(true, std::memory_order_relaxed);
  }
}

struct Unpacking {
  const ms_header *header;
  uint8_t *codes, *scales;
};

void unpack_panel(void *context, int64_t unit, int) {
  const Unpacking &job = *static_cast<Unpacking *>(context);
  const int format = job.header->format, bits = traits(format).bits;
  const int64_t n = job.header->n, k = job.header->k, stride = row_bytes(format, k);
  const Place at(n, unit);
  uint8_t *rows = job.codes + at.codes(format, n, k), *out = job.scales + at.scales(format, n, k);
  const uint8_t *expert = reinterpret_cast<const uint8_t *>(job.header) + expert_offset(job.header, at.expert);
  const PanelPlace place = panel_place(format, n, k, at.panel);
  const uint8_t *in = expert + place.scales;
  const Lanes *panel = reinterpret_cast<const Lanes *>(expert + place.codes);
  const int64_t step = place.step / static_cast<int64_t>(sizeof(Lanes));

  if (bits == 4) unpack_codes<4>(panel, step, stride, at.columns, rows);
  if (bits == 6) unpack_codes<6>(panel, step, stride, at.columns, rows);
  if (bits == 8) unpack_codes<8>(panel, step, stride, at.columns, rows);

  const int64_t blocks = scale_columns(format, k), each = traits(format).blocks_per_tile;
  if (each == 0) {
    // Eight panels share these scales; the first one gives them back.
    if (at.column % traits(format).block_rows == 0) std::memcpy(out, in, static_cast<size_t>(4 * blocks));
  } else {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t c = 0; c < at.columns; ++c)
        out[c * blocks + b] = in[b / each * place.step + b % each * kPanelColumns + c];
  }
}

bool usable(const void *packed) { return packed != nullptr && reinterpret_cast<uintptr_t>(packed) % kAlignment == 0; }

}  // namespace
}  // namespace microscale

using namespace microscale;

int64_t ms_packed_bytes(int format, int64_t experts, int64_t n, int64_t k) {
  return packed_bytes(format, experts, n, k);
}

int ms_pack(int format, int64_t experts, int64_t n, int64_t k, const uint8_t *codes, const void *scales, void *packed,
            int threads) {
  const int64_t bytes = packed_bytes(format, experts, n, k);
  if (bytes < 0 || !usable(packed)) return MS_BAD_ARGUMENT;
  if (bytes > kHeaderBytes && (codes == nullptr || scales == nullptr)) return MS_BAD_ARGUMENT;
  ms_header header = {MS_MAGIC, format, 0, experts, n, k, bytes, {}};
  use_large_pages(packed, static_cast<size_t>(bytes));  // a page fault for each 4 KB takes longer than packing them
  std::memset(packed, 0, sizeof header);                // a refused tensor leaves no valid header
  Packing job{&header, codes, static_cast<const uint8_t *>(scales), static_cast<uint8_t *>(packed)};
  if (bytes > kHeaderBytes) parallel(threads, experts * panels(n), pack_panel, &job);
  if (job.dirty.load(std::memory_order_relaxed)) return MS_BAD_ARGUMENT;
  if (job.special.load(std::memory_order_relaxed)) header.flags |= MS_SPECIAL;
  std::memcpy(packed, &header, sizeof header);
  return MS_OK;
}

int ms_unpack(const void *packed, int64_t bytes, uint8_t *codes, void *scales, int threads) {
  if (!usable(packed)) return MS_BAD_ARGUMENT;
  const ms_header *header = bytes < kHeaderBytes ? nullptr : header_of(packed);
  if (header == nullptr || header->bytes != bytes) return MS_BAD_HEADER;
  if (bytes == kHeaderBytes) return MS_OK;
  if (codes == nullptr || scales == nullptr) return MS_BAD_ARGUMENT;
  Unpacking job{header, codes, static_cast<uint8_t *>(scales)};
  parallel(threads, header->experts * panels(header->n), unpack_panel, &job);
  return MS_OK;
}
