// AMX with bfloat16 tiles: weights are decoded with their scales into tiles of 16 columns x 32 k, which 16 rows share.
// A row's sum runs through all of K in one tile register (block FP8: through each block of 128), in the same order for one
// row as for a thousand, so the result is the same to the bit. Rows are equally far apart.
#include "decode_avx512.h"
#include "rows.h"
#include "table.h"

namespace microscale {
namespace {

constexpr int64_t kTile = 1024;       // bytes decoded
constexpr int64_t kChunk = 8;         // tiles of K that many rows share: those of four panels fit in L1 beside rows
constexpr int64_t kSums = 16 * 64 * 4;
constexpr int64_t kAhead = 1024;      // bytes that a panel is fetched ahead
constexpr int64_t kScratch = 4 * kChunk * kTile + kSums;

// The tile instructions below tell the compiler nothing of the memory they touch.
inline void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// At most 16 rows: sums of panel p are tile p, rows tile 4, weights tiles 5 to 7 in turn.
void configure(int64_t rows) {
  Config c;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = i < 5 ? static_cast<uint8_t>(rows) : 16;
  __asm__ volatile("" ::"r"(&c) : "memory");  // the instruction's own operand names its first bytes only
  _tile_loadconfig(&c);
}

template <int P>
inline void zero() {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (P > 2) _tile_zero(2);
  if constexpr (P > 3) _tile_zero(3);
}

template <int P>
inline void load(const float *out, int64_t stride) {
  fence();
  _tile_loadd(0, out, 4 * stride);
  if constexpr (P > 1) _tile_loadd(1, out + 16, 4 * stride);
  if constexpr (P > 2) _tile_loadd(2, out + 32, 4 * stride);
  if constexpr (P > 3) _tile_loadd(3, out + 48, 4 * stride);
}

template <int P>
inline void store(float *out, int64_t stride) {
  _tile_stored(0, out, 4 * stride);
  if constexpr (P > 1) _tile_stored(1, out + 16, 4 * stride);
  if constexpr (P > 2) _tile_stored(2, out + 32, 4 * stride);
  if constexpr (P > 3) _tile_stored(3, out + 48, 4 * stride);
  fence();
}

// The loaded rows times panel p's tile; p is a constant wherever this is inlined.
inline __attribute__((always_inline)) void multiply_panel(int p, const uint8_t *w) {
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

// One step of 32 k: rows at `x`, P decoded tiles at `w`.
template <int P>
inline void multiply(const uint8_t *x, const uint8_t *w) {
  _tile_loadd(4, x, 64);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) multiply_panel(p, w + p * kTile);
}

// Codes of one tile with their block scales as bfloat16, which holds the products exactly: a power of two changes the
// exponent alone, and an E2M1 code times an E4M3 scale has six significant bits. Block FP8 keeps its scales for later.
template <int kFormat>
struct Decoder {
  static constexpr Raise kHow =
      kFormat == MS_FP8_BLOCK128 ? kAsIs : kFormat == MS_NVFP4 ? kFlagged : kRaised;
  const Codes<kFormat, kHow> codes{};

  void tile(const uint8_t *from, const uint8_t *scales, uint8_t *out) const {
    for (int64_t i = 0; i < tile_bytes(kFormat) + tile_scale_bytes(kFormat); i += 64)
      _mm_prefetch(reinterpret_cast<const char *>(from + kAhead + i), _MM_HINT_T0);
    const auto put = [out](int pair, __m512i v) { _mm512_store_si512(out + 64 * pair, v); };
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      codes.template pairs<false>(from, 0, 16, put);
    } else if constexpr (kFormat == MS_NVFP4) {
      for (int block = 0; block < 2; ++block) {
        const __m512 scale = scale512<kFormat, false>(scales, 0, block);
        const __m512i power = lowering(scale, 0);
        const __m512i half_more = lowering(_mm512_mul_ps(scale, _mm512_set1_ps(1.5f)), 1);
        codes.template pairs<false>(from, 8 * block, 8 * block + 8, put, [&](__m512i v) {
          const auto one_and_a_half = _mm512_test_epi16_mask(v, words(1));
          return _mm512_mask_subs_epu16(_mm512_subs_epu16(v, power), one_and_a_half, v, half_more);
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

  // What must be taken from the bits of a raised power of two, plus `flag`, for its product with a positive `scale` of at
  // most eight significant bits; everything where the scale is zero.
  static __m512i lowering(__m512 scale, int flag) {
    const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(scale), 16);
    __m512i less = _mm512_sub_epi32(_mm512_set1_epi32(((127 + kRaise) << 7) + flag), bits);
    less = _mm512_mask_mov_epi32(less, _mm512_testn_epi32_mask(bits, bits), _mm512_set1_epi32(0xffff));
    return _mm512_or_si512(less, _mm512_slli_epi32(less, 16));
  }
};

// Neighbouring panels of one group.
struct Panels {
  const uint8_t *codes, *scales;
  int64_t step, scale_step, next_scales;  // next_scales: from one panel's scales to the next panel's

  Panels(int format, const Product &a, int64_t panel) {
    const PanelPlace at = panel_place(format, a.n, a.k, panel);
    codes = a.weights + at.codes;
    scales = a.weights + at.scales;
    step = at.step;
    scale_step = at.scale_step;
    next_scales = scale_step ? tile_scale_bytes(format) : panel_scale_bytes(format, a.k);
  }
  float scale(int p, int64_t tile) const {  // block FP8
    return reinterpret_cast<const float *>(scales + p * next_scales)[tile / 4];
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

// At most 16 rows.
struct Rows {
  const uint8_t *x;
  int64_t step;  // bytes between tiles of K
  int64_t m;
  float *out;
  int64_t stride;
};

inline Rows rows_from(const Product &a, int64_t row, float *out) {
  const int64_t m = a.m - row < 16 ? a.m - row : 16;
  const auto x = static_cast<const uint8_t *>(a.rows[0]) + row * 64 * tiles(a.k);
  return {x, 64 * m, m, out + row * a.stride, a.stride};
}

// At most 16 rows: every tile is decoded a little before it is multiplied, so that both kinds of work overlap.
template <int kFormat, int P>
void together(const Panels &panels, int64_t tiles, const Rows &r, uint8_t *scratch) {
  constexpr int64_t kLag = 2, kRing = 4;
  const Decoder<kFormat> decoder;
  float *sums = reinterpret_cast<float *>(scratch + 4 * kChunk * kTile);
  configure(r.m);
  zero<P>();
  for (int64_t t = 0; t < tiles + kLag; ++t) {
    const int64_t now = t - kLag;
    const uint8_t *w = scratch + now % kRing * P * kTile;
    uint8_t *next = scratch + t % kRing * P * kTile;
    if (now >= 0) _tile_loadd(4, r.x + now * r.step, 64);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if (t < tiles) panels.decode(decoder, p, t, next + p * kTile);
      fence();
      if (now >= 0) multiply_panel(p, w + p * kTile);
    }
    if (now < 0) continue;
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      if (now % 4 != 3 && now + 1 < tiles) continue;
      float scale[P];
      for (int p = 0; p < P; ++p) scale[p] = panels.scale(p, now);
      store<P>(sums, 16 * P);
      add_scaled<P>(sums, r.m, scale, now < 4, r.out, r.stride);
      zero<P>();
    }
  }
  if constexpr (kFormat != MS_FP8_BLOCK128) store<P>(r.out, r.stride);
}

template <int kFormat, int P>
void steps(const uint8_t *w, const Panels &panels, int64_t tile, int64_t tiles, const Rows &r, float *sums) {
  const uint8_t *x = r.x + tile * r.step;
  if constexpr (kFormat == MS_FP8_BLOCK128) {
    for (int64_t t = 0; t < tiles; t += 4) {
      zero<P>();
      for (int64_t i = t; i < t + 4 && i < tiles; ++i) multiply<P>(x + i * r.step, w + i * P * kTile);
      float scale[P];
      for (int p = 0; p < P; ++p) scale[p] = panels.scale(p, tile + t);
      store<P>(sums, 16 * P);
      add_scaled<P>(sums, r.m, scale, tile + t == 0, r.out, r.stride);
    }
  } else {
    if (tile)
      load<P>(r.out, r.stride);
    else
      zero<P>();
    for (int64_t i = 0; i < tiles; ++i) multiply<P>(x + i * r.step, w + i * P * kTile);
    store<P>(r.out, r.stride);
  }
}

// Two row tiles x two panels: each tile loaded serves two products. Sums of row tile r and panel p are tile 2 r + p.
struct Square {
  Rows first, second;
  float *sums;

  static void configure(int64_t first_rows, int64_t second_rows) {
    Config c;
    for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
    c.rows[0] = c.rows[1] = c.rows[4] = static_cast<uint8_t>(first_rows);
    c.rows[2] = c.rows[3] = c.rows[5] = static_cast<uint8_t>(second_rows);
    __asm__ volatile("" ::"r"(&c) : "memory");
    _tile_loadconfig(&c);
  }
  static void zero() { microscale::zero<4>(); }
  void load(int64_t column) const {
    fence();
    const int64_t bytes = 4 * first.stride;
    _tile_loadd(0, first.out + column, bytes);
    _tile_loadd(1, first.out + column + 16, bytes);
    _tile_loadd(2, second.out + column, bytes);
    _tile_loadd(3, second.out + column + 16, bytes);
  }
  static void store(float *a, float *b, int64_t stride) {
    _tile_stored(0, a, 4 * stride);
    _tile_stored(1, a + 16, 4 * stride);
    _tile_stored(2, b, 4 * stride);
    _tile_stored(3, b + 16, 4 * stride);
    fence();
  }
  void multiply(int64_t tile, const uint8_t *w) const {
    _tile_loadd(4, first.x + tile * first.step, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second.x + tile * second.step, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

// Tiles [tile, tile + tiles) of K for panels p and p + 1 of P, whose decoded tiles are at `w`.
template <int kFormat, int P>
void square_steps(const uint8_t *w, const Panels &panels, int p, int64_t tile, int64_t tiles, const Square &s) {
  w += p * kTile;
  const int64_t column = 16 * p;
  if constexpr (kFormat == MS_FP8_BLOCK128) {
    for (int64_t t = 0; t < tiles; t += 4) {
      Square::zero();
      for (int64_t i = t; i < t + 4 && i < tiles; ++i) s.multiply(tile + i, w + i * P * kTile);
      const float scale[2] = {panels.scale(p, tile + t), panels.scale(p + 1, tile + t)};
      Square::store(s.sums, s.sums + 16 * 32, 32);
      add_scaled<2>(s.sums, s.first.m, scale, tile + t == 0, s.first.out + column, s.first.stride);
      add_scaled<2>(s.sums + 16 * 32, s.second.m, scale, tile + t == 0, s.second.out + column, s.second.stride);
    }
  } else {
    if (tile)
      s.load(column);
    else
      Square::zero();
    for (int64_t i = 0; i < tiles; ++i) s.multiply(tile + i, w + i * P * kTile);
    Square::store(s.first.out + column, s.second.out + column, s.first.stride);
  }
}

// More rows: a chunk of K is decoded once and stays in L1 for all of them.
template <int kFormat, int P>
void apart(const Panels &panels, int64_t tiles, const Product &a, float *out, uint8_t *scratch) {
  const Decoder<kFormat> decoder;
  float *sums = reinterpret_cast<float *>(scratch + 4 * kChunk * kTile);
  for (int64_t tile = 0; tile < tiles; tile += kChunk) {
    const int64_t now = tiles - tile < kChunk ? tiles - tile : kChunk;
    for (int64_t t = 0; t < now; ++t)
      for (int p = 0; p < P; ++p) panels.decode(decoder, p, tile + t, scratch + (t * P + p) * kTile);
    fence();
    int64_t row = 0;
    if (P % 2 == 0) {
      Square::configure(16, 16);
      for (; row + 16 < a.m; row += 32) {
        const Square s{rows_from(a, row, out), rows_from(a, row + 16, out), sums};
        if (s.second.m < 16) Square::configure(16, s.second.m);
        for (int p = 0; p < P; p += 2) square_steps<kFormat, P>(scratch, panels, p, tile, now, s);
      }
    } else {
      configure(16);
    }
    for (; row < a.m; row += 16) {
      const Rows r = rows_from(a, row, out);
      if (P % 2 == 0 || r.m < 16) configure(r.m);
      steps<kFormat, P>(scratch, panels, tile, now, r, sums);
    }
  }
}

template <int kFormat, int P>
void some_panels(const Product &a, int64_t panel, float *out, uint8_t *scratch) {
  const Panels panels(kFormat, a, panel);
  if (a.m <= 16)
    together<kFormat, P>(panels, tiles(a.k), rows_from(a, 0, out), scratch);
  else
    apart<kFormat, P>(panels, tiles(a.k), a, out, scratch);
}

template <int kFormat>
void product(const Product *a) {
  const auto scratch = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(a->scratch) + 63) / 64 * 64);
  for (int64_t p = 0; p < a->count;) {
    const int64_t panel = a->first + p, group = kGroupPanels - panel % kGroupPanels;
    const int64_t now = a->count - p < group ? a->count - p : group;
    float *out = a->out + 16 * p;
    switch (now) {
      case 4: some_panels<kFormat, 4>(*a, panel, out, scratch); break;
      case 3: some_panels<kFormat, 3>(*a, panel, out, scratch); break;
      case 2: some_panels<kFormat, 2>(*a, panel, out, scratch); break;
      default: some_panels<kFormat, 1>(*a, panel, out, scratch);
    }
    p += now;
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
