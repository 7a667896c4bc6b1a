// AMX with bfloat16 tiles: weights are decoded with their scales into tiles of 16 columns x 32 k, which rows share.
// A row's sum runs through all of K in one tile register (block FP8: through each block of 128), in the same order for
// one row as for a thousand, so the result is the same to the bit. Rows are equally far apart.
#include "decode_avx512.h"
#include "rows.h"
#include "table.h"

namespace microscale {
namespace {

constexpr int64_t kTile = 1024;   // bytes decoded
constexpr int64_t kAhead = 4096;  // bytes that codes are fetched ahead
constexpr int64_t kChunk = 128;   // decoded tiles of K that many rows share: those of two panels stay in L2
constexpr int64_t kBehind = 12;   // tiles between decoding and multiplication
constexpr int64_t kSums = 2 * 16 * 64 * 4;
constexpr int64_t kScratch = 2 * kChunk * kTile + kSums;

// The tile instructions below tell the compiler nothing of the memory they touch.
inline void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// R = 1 row tile: sums of panel p are tile p, rows tile 4, weights tiles 5 to 7 in turn; P up to 4.
// R = 2: sums of row tile r and panel p are tile 2 r + p, rows tiles 4 and 5, weights tiles 6 and 7; P up to 2.
// Loading a configuration takes as long as 16 products.
template <int R>
void configure(int64_t rows) {
  Config c;
  const int first = static_cast<int>(rows < 16 ? rows : 16), second = static_cast<int>(rows) - first;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
  for (int i = 0; i < 5; ++i) c.rows[i] = static_cast<uint8_t>(R == 2 && (i == 2 || i == 3) ? second : first);
  if (R == 2) c.rows[5] = static_cast<uint8_t>(second);
  __asm__ volatile("" ::"r"(&c) : "memory");  // the instruction's own operand names its first bytes only
  _tile_loadconfig(&c);
}

inline void zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Sums from or to [16 R][16 P] floats, `stride` bytes between rows.
template <int R, int P>
inline void load(const float *out, int64_t stride) {
  fence();
  const float *second = out + 4 * stride;  // 16 rows
  _tile_loadd(0, out, stride);
  if constexpr (P > 1) _tile_loadd(1, out + 16, stride);
  if constexpr (R == 1 && P > 2) _tile_loadd(2, out + 32, stride);
  if constexpr (R == 1 && P > 3) _tile_loadd(3, out + 48, stride);
  if constexpr (R == 2) _tile_loadd(2, second, stride);
  if constexpr (R == 2 && P > 1) _tile_loadd(3, second + 16, stride);
}

template <int R, int P>
inline void store(float *out, int64_t stride) {
  float *second = out + 4 * stride;
  _tile_stored(0, out, stride);
  if constexpr (P > 1) _tile_stored(1, out + 16, stride);
  if constexpr (R == 1 && P > 2) _tile_stored(2, out + 32, stride);
  if constexpr (R == 1 && P > 3) _tile_stored(3, out + 48, stride);
  if constexpr (R == 2) _tile_stored(2, second, stride);
  if constexpr (R == 2 && P > 1) _tile_stored(3, second + 16, stride);
  fence();
}

// At most 16 R rows.
template <int R>
struct Rows {
  const uint8_t *x, *y;    // the two row tiles' operands
  int64_t x_step, y_step;  // bytes between tiles of K
  int64_t m;
  float *out;
  int64_t stride;  // of out, bytes

  Rows(const Product &a, int64_t row, float *to) {
    const int64_t left = a.m - row, first = left < 16 ? left : 16;
    m = left < 16 * R ? left : 16 * R;
    x = static_cast<const uint8_t *>(a.rows[0]) + row * 64 * tiles(a.k);
    y = x + 16 * 64 * tiles(a.k);
    x_step = 64 * first;
    y_step = 64 * (m - first);
    out = to + row * a.stride;
    stride = 4 * a.stride;
  }
  void load(int64_t tile) const {
    _tile_loadd(4, x + tile * x_step, 64);
    if constexpr (R == 2) _tile_loadd(5, y + tile * y_step, 64);
  }
};

// The loaded rows times panel p's tile; p is a constant wherever this is inlined.
template <int R>
inline __attribute__((always_inline)) void multiply(int p, const uint8_t *w) {
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
  } else if (p == 0) {
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

// E4M3 scales as bits of bfloat16 numbers, and those of 1.5 times as much.
struct alignas(64) ScaleTables {
  static constexpr int kTop = (127 + kRaise) << 7;
  int32_t subnormal[16], subnormal_more[16];  // of scale bytes 0 to 7; zero takes all that there is
  int32_t more[16];                           // by the three mantissa bits: what 1.5 times adds to the bits
};
constexpr int32_t half_as_much_more(uint32_t bits) {  // of a float with at most five significant bits
  const uint32_t significand = (bits & 0x7fffff) | 0x800000, larger = significand + significand / 2;
  const uint32_t exponent = bits >> 23;
  const uint32_t result =
      larger >> 24 ? (exponent + 1) << 23 | (larger / 2 & 0x7fffff) : exponent << 23 | (larger & 0x7fffff);
  return static_cast<int32_t>(result >> 16);
}
constexpr ScaleTables scale_tables() {
  ScaleTables t{};
  for (uint32_t i = 0; i < 16; ++i) {
    const uint32_t subnormal = float_bits(kE4M3, i % 8), normal = float_bits(kE4M3, 8 + i % 8);
    t.more[i] = half_as_much_more(normal) - static_cast<int32_t>(normal >> 16);
    t.subnormal[i] = i % 8 ? static_cast<int32_t>(subnormal >> 16) : ScaleTables::kTop - 0xffff;
    t.subnormal_more[i] = i % 8 ? half_as_much_more(subnormal) : ScaleTables::kTop + 1 - 0xffff;
  }
  return t;
}
constexpr ScaleTables kScales = scale_tables();

// Codes of one tile with their block scales as bfloat16, which holds the products exactly: a power of two changes the
// exponent alone, and an E2M1 code times an E4M3 scale has six significant bits. Block FP8 keeps its scales for later.
template <int kFormat>
struct Decoder {
  static constexpr Raise kHow = kFormat == MS_FP8_BLOCK128 ? kAsIs : kFormat == MS_NVFP4 ? kFlagged : kRaised;
  const Codes<kFormat, kHow> codes{};

  void tile(const uint8_t *from, const uint8_t *scales, uint8_t *out) const {
    const auto put = [out](int pair, __m512i v) { _mm512_store_si512(out + 64 * pair, v); };
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      codes.template pairs<false>(from, 0, 16, put);
    } else if constexpr (kFormat == MS_NVFP4) {
      for (int block = 0; block < 2; ++block) {
        const Lowering less = lowering(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales + 16 * block)));
        codes.template pairs<false>(from, 8 * block, 8 * block + 8, put, [&](__m512i v) {
          const auto half_more = _mm512_test_epi16_mask(v, words(1));
          return _mm512_mask_subs_epu16(_mm512_subs_epu16(v, less.power), half_more, v, less.half_more);
        });
      }
    } else {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales)));
      const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 16));
      if constexpr (kFormat == MS_MXINT8) {
        const __m512i exponent = _mm512_slli_epi16(_mm512_sub_epi16(both, words(127 - Codes<kFormat>::kShift)), 7);
        codes.template pairs<false>(from, 0, 16, put, [&](__m512i v) {
          return _mm512_mask_add_epi16(v, _mm512_test_epi16_mask(v, words(0x7fff)), v, exponent);
        });
      } else {
        const __m512i less = _mm512_slli_epi16(_mm512_sub_epi16(words(127 + kRaise), both), 7);
        codes.template pairs<false>(from, 0, 16, put, [&](__m512i v) { return _mm512_subs_epu16(v, less); });
      }
    }
  }

  // What must be taken from the bits of a raised power of two, and of one that is flagged to be half as much more, for
  // its product with a positive E4M3 scale; everything where the scale is zero.
  struct Lowering {
    __m512i power, half_more;
  };
  const __m512i subnormals = load512(&kScales.subnormal), subnormals_more = load512(&kScales.subnormal_more);
  const __m512i more = load512(&kScales.more);

  Lowering lowering(__m128i bytes) const {
    const __m512i s = _mm512_cvtepu8_epi32(bytes);
    __m512i one = _mm512_add_epi32(_mm512_slli_epi32(s, 4), _mm512_set1_epi32((127 - 7) << 7));
    __m512i half_more = _mm512_add_epi32(one, _mm512_permutexvar_epi32(s, more));
    const auto subnormal = _mm512_cmplt_epu32_mask(s, _mm512_set1_epi32(8));
    one = _mm512_mask_permutexvar_epi32(one, subnormal, s, subnormals);
    half_more = _mm512_mask_permutexvar_epi32(half_more, subnormal, s, subnormals_more);
    one = _mm512_sub_epi32(_mm512_set1_epi32(kScales.kTop), one);
    half_more = _mm512_sub_epi32(_mm512_set1_epi32(kScales.kTop + 1), half_more);  // and the flag
    return {_mm512_or_si512(one, _mm512_slli_epi32(one, 16)),
            _mm512_or_si512(half_more, _mm512_slli_epi32(half_more, 16))};
  }
};

// Neighbouring panels of one group.
struct Panels {
  const uint8_t *codes, *scales;
  int64_t step, scale_step, next_scales;  // next_scales: from one panel's scales to the next panel's
  const uint8_t *next;                    // what is read after them

  Panels(int format, const Product &a, int64_t panel, int64_t count) {
    const PanelPlace at = panel_place(format, a.n, a.k, panel);
    codes = a.weights + at.codes;
    scales = a.weights + at.scales;
    step = at.step;
    scale_step = at.scale_step;
    next_scales = scale_step ? tile_scale_bytes(format) : panel_scale_bytes(format, a.k);
    const bool last = panel + count == a.first + a.count;
    next = last ? a.next : a.weights + panel_place(format, a.n, a.k, panel + count).codes;
  }
  float scale(int p, int64_t tile) const {  // block FP8
    return reinterpret_cast<const float *>(scales + p * next_scales)[tile / 4];
  }
  // One step of all panels of the group, some steps before it is needed.
  void fetch(int64_t tile, int64_t tiles) const {
    const int64_t ahead = kAhead / step + 1;
    const uint8_t *from = tile + ahead < tiles ? codes + (tile + ahead) * step : next + (tile + ahead - tiles) * step;
    for (int64_t i = 0; i < step; i += 64) _mm_prefetch(reinterpret_cast<const char *>(from + i), _MM_HINT_T1);
  }
  template <int kFormat>
  void decode(const Decoder<kFormat> &decoder, int p, int64_t tile, uint8_t *out) const {
    decoder.tile(codes + tile * step + p * tile_bytes(kFormat), scales + tile * scale_step + p * next_scales, out);
  }
};

// out += sums * scale, a scale for each panel.
template <int P>
inline void add_scaled(const float *sums, int64_t m, const float *scale, bool first, float *out, int64_t stride) {
  for (int64_t i = 0; i < m; ++i)
    for (int p = 0; p < P; ++p) {
      float *o = out + i * stride + 16 * p;
      const __m512 so_far = first ? _mm512_setzero_ps() : _mm512_loadu_ps(o);
      const __m512 sum = _mm512_loadu_ps(sums + i * 16 * P + 16 * p);
      _mm512_storeu_ps(o, _mm512_fmadd_ps(sum, _mm512_set1_ps(scale[p]), so_far));
    }
}

// What a block of K of block FP8 gave, to the sums so far.
template <int kFormat, int R, int P>
inline void end_block(const Panels &panels, int64_t tile, const Rows<R> &r, float *sums) {
  float scale[P];
  for (int p = 0; p < P; ++p) scale[p] = panels.scale(p, tile);
  store<R, P>(sums, 64 * P);
  add_scaled<P>(sums, r.m, scale, tile < 4, r.out, r.stride / 4);
  zero();
}

// Tiles [tile, end) of K times some rows. kDecode: every tile is decoded a little before it is multiplied, so that both
// kinds of work overlap, to slot (t - tile) % ring; otherwise all are there already.
template <int kFormat, int R, int P, bool kDecode>
void block(const Panels &panels, int64_t tile, int64_t end, int64_t tiles, int64_t ring, const Rows<R> &r,
           uint8_t *decoded, float *sums) {
  // So far behind that the decoded lines have left the store buffer: tile loads cannot take them from there.
  constexpr int64_t kLag = kDecode ? kBehind / P : 0;
  constexpr bool kBlockScales = kFormat == MS_FP8_BLOCK128;
  const Decoder<kFormat> decoder;
  if (tile == 0 || kBlockScales)
    zero();
  else
    load<R, P>(r.out, r.stride);
  int64_t slot = 0, slot_now = 0;
  for (int64_t t = tile; t < end + kLag; ++t) {
    const int64_t now = t - kLag;
    const uint8_t *w = decoded + slot_now * P * kTile;
    uint8_t *to = decoded + slot * P * kTile;
    if (now >= tile) r.load(now);
    if (kDecode && t < end) panels.fetch(t, tiles);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if (kDecode && t < end) panels.decode(decoder, p, t, to + p * kTile);
      fence();
      if (now >= tile) multiply<R>(p, w + p * kTile);
    }
    slot = slot + 1 == ring ? 0 : slot + 1;
    if (now < tile) continue;
    slot_now = slot_now + 1 == ring ? 0 : slot_now + 1;
    if (kBlockScales && (now % 4 == 3 || now + 1 == tiles)) end_block<kFormat, R, P>(panels, now, r, sums);
  }
  if (!kBlockScales) store<R, P>(r.out, r.stride);
}

// At most 16 rows: four panels at a time keep the products of one row tile apart.
template <int kFormat, int P>
void few(const Product &a, int64_t panel, float *out, uint8_t *scratch, float *sums) {
  const Rows<1> r(a, 0, out);
  configure<1>(r.m);
  const int64_t all = tiles(a.k);
  block<kFormat, 1, P, true>(Panels(kFormat, a, panel, P), 0, all, all, kBehind / P + 2, r, scratch, sums);
}

// More: two row tiles times two panels, so that each tile loaded serves two products. The first rows decode a chunk of
// K, and the others find it in L2.
template <int kFormat, int P>
void many(const Product &a, int64_t panel, float *out, uint8_t *scratch, float *sums) {
  const Panels panels(kFormat, a, panel, P);
  const int64_t all = tiles(a.k);
  for (int64_t tile = 0; tile < all; tile += kChunk) {
    const int64_t end = tile + kChunk < all ? tile + kChunk : all;
    configure<2>(a.m < 32 ? a.m : 32);
    block<kFormat, 2, P, true>(panels, tile, end, all, kChunk, Rows<2>(a, 0, out), scratch, sums);
    for (int64_t row = 32; row < a.m; row += 32) {
      const int64_t left = a.m - row;
      if (left <= 16) {
        configure<1>(left);
        block<kFormat, 1, P, false>(panels, tile, end, all, kChunk, Rows<1>(a, row, out), scratch, sums);
      } else {
        if (left < 32) configure<2>(left);
        block<kFormat, 2, P, false>(panels, tile, end, all, kChunk, Rows<2>(a, row, out), scratch, sums);
      }
    }
  }
}

template <int kFormat>
void product(const Product *a) {
  const auto scratch = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(a->scratch) + 63) / 64 * 64);
  float *sums = reinterpret_cast<float *>(scratch + 2 * kChunk * kTile);
  for (int64_t p = 0; p < a->count;) {
    const int64_t panel = a->first + p, group = kGroupPanels - panel % kGroupPanels;
    const int64_t left = a->count - p < group ? a->count - p : group;
    float *out = a->out + 16 * p;
    if (a->m > 16) {
      if (left >= 2)
        many<kFormat, 2>(*a, panel, out, scratch, sums);
      else
        many<kFormat, 1>(*a, panel, out, scratch, sums);
      p += left >= 2 ? 2 : 1;
    } else {
      switch (left) {
        case 4: few<kFormat, 4>(*a, panel, out, scratch, sums); break;
        case 3: few<kFormat, 3>(*a, panel, out, scratch, sums); break;
        case 2: few<kFormat, 2>(*a, panel, out, scratch, sums); break;
        default: few<kFormat, 1>(*a, panel, out, scratch, sums);
      }
      p += left;
    }
  }
  _tile_release();
}

}  // namespace

extern const Kernels amx_kernels = {
    MS_BF16,
    1,
    kScratch + 64,
    {product<MS_MXFP4>, product<MS_MXFP6_E2M3>, product<MS_MXFP6_E3M2>, product<MS_MXFP8_E4M3>, product<MS_MXFP8_E5M2>,
     product<MS_MXINT8>, product<MS_NVFP4>, product<MS_FP8_BLOCK128>},
    activate_rows<MS_BF16>,
    load_row<MS_BF16>,
    add_row,
    store_row,
};

}  // namespace microscale
