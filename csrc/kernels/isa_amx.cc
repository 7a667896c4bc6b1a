// AMX with bfloat16 tiles: weights are decoded with their scales into tiles of 16 columns x 32 k, which up to 32 rows share.
// A row's sum runs through all of K in one tile register (block FP8: through each block of 128), in the same order for one
// row as for a thousand, so the result is the same to the bit. Rows are equally far apart.
#include "decode_avx512.h"
#include "rows.h"
#include "table.h"

namespace microscale {
namespace {

constexpr int64_t kTile = 1024;       // bytes decoded
constexpr int64_t kChunk = 16;        // tiles of K that many rows share: two panels of them fit in half of L1
constexpr int64_t kSums = 32 * 32 * 4;
constexpr int64_t kAhead = 1024;      // bytes that a panel is fetched ahead
constexpr int64_t kScratch = 2 * kChunk * kTile + kSums;

// The tile instructions below tell the compiler nothing of the memory they touch.
inline void fence() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums are tiles 0 to 3, rows 4 and 5, weights 6 and 7. R = 1: sums of panel p in
// tile p. R = 2: those of row tile r and panel p in tile 2 r + p.
void configure(int64_t first_rows, int64_t second_rows) {
  Config c;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
  const auto first = static_cast<uint8_t>(first_rows), second = static_cast<uint8_t>(second_rows);
  c.rows[4] = first;
  if (second_rows) {
    c.rows[0] = c.rows[1] = first;
    c.rows[2] = c.rows[3] = c.rows[5] = second;
  } else {
    c.rows[0] = c.rows[1] = c.rows[2] = c.rows[3] = first;
  }
  __asm__ volatile("" ::"r"(&c) : "memory");  // the instruction's own operand names its first bytes only
  _tile_loadconfig(&c);
}

template <int R, int P>
inline void zero() {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (P > 2 || R > 1) _tile_zero(2);
  if constexpr (P > 3 || (R > 1 && P > 1)) _tile_zero(3);
}

template <int R, int P>
inline void load(const float *out, int64_t stride) {
  fence();
  const int64_t bytes = 4 * stride;
  _tile_loadd(0, out, bytes);
  if constexpr (P > 1) _tile_loadd(1, out + 16, bytes);
  if constexpr (R == 1 && P > 2) _tile_loadd(2, out + 32, bytes);
  if constexpr (R == 1 && P > 3) _tile_loadd(3, out + 48, bytes);
  if constexpr (R == 2) _tile_loadd(2, out + 16 * stride, bytes);
  if constexpr (R == 2 && P > 1) _tile_loadd(3, out + 16 * stride + 16, bytes);
}

template <int R, int P>
inline void store(float *out, int64_t stride) {
  const int64_t bytes = 4 * stride;
  _tile_stored(0, out, bytes);
  if constexpr (P > 1) _tile_stored(1, out + 16, bytes);
  if constexpr (R == 1 && P > 2) _tile_stored(2, out + 32, bytes);
  if constexpr (R == 1 && P > 3) _tile_stored(3, out + 48, bytes);
  if constexpr (R == 2) _tile_stored(2, out + 16 * stride, bytes);
  if constexpr (R == 2 && P > 1) _tile_stored(3, out + 16 * stride + 16, bytes);
  fence();
}

template <int R>
inline void load_rows(const uint8_t *x, const uint8_t *y) {
  _tile_loadd(4, x, 64);
  if constexpr (R == 2) _tile_loadd(5, y, 64);
}

// The loaded rows times panel p's tile; p is a constant wherever this is inlined.
template <int R>
inline void multiply_panel(int p, const uint8_t *w) {
  if (p % 2 == 0)
    _tile_loadd(6, w, 64);
  else
    _tile_loadd(7, w, 64);
  if (p == 0) {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
  } else if (p == 1) {
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
  } else if (p == 2) {
    _tile_dpbf16ps(2, 4, 6);
  } else {
    _tile_dpbf16ps(3, 4, 7);
  }
}

// One step of 32 k: row tiles at `x` and `y`, P decoded tiles at `w`.
template <int R, int P>
inline void multiply(const uint8_t *x, const uint8_t *y, const uint8_t *w) {
  load_rows<R>(x, y);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) multiply_panel<R>(p, w + p * kTile);
}

// Codes of one tile with their block scales as bfloat16, which holds the products exactly: a power of two changes the
// exponent alone, and an E2M1 code times an E4M3 scale has six significant bits. Block FP8 keeps its scales for later.
template <int kFormat>
struct Decoder {
  static constexpr Raise kHow =
      kFormat == MS_FP8_BLOCK128 ? kAsIs : kFormat == MS_NVFP4 ? kFlagged : kRaised;
  const Codes<kFormat, kHow> codes{};

  void tile(const uint8_t *panel, const uint8_t *scales, int64_t tile, uint8_t *out) const {
    const uint8_t *from = panel + tile * tile_bytes(kFormat);
    for (int64_t i = 0; i < tile_bytes(kFormat); i += 64)
      _mm_prefetch(reinterpret_cast<const char *>(from + kAhead + i), _MM_HINT_T0);
    const auto put = [out](int pair, __m512i v) { _mm512_store_si512(out + 64 * pair, v); };
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      codes.template pairs<false>(from, 0, 16, put);
    } else if constexpr (kFormat == MS_NVFP4) {
      for (int block = 0; block < 2; ++block) {
        const __m512 scale = scale512<kFormat, false>(scales, tile, block);
        const __m512i power = lowering(scale, 0);
        const __m512i half_more = lowering(_mm512_mul_ps(scale, _mm512_set1_ps(1.5f)), 1);
        codes.template pairs<false>(from, 8 * block, 8 * block + 8, put, [&](__m512i v) {
          const auto one_and_a_half = _mm512_test_epi16_mask(v, words(1));
          return _mm512_mask_subs_epu16(_mm512_subs_epu16(v, power), one_and_a_half, v, half_more);
        });
      }
    } else {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales + 16 * tile)));
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

// At most 32 rows: one or two tiles, each of at most 16.
struct Rows {
  const uint8_t *x, *y;
  int64_t x_step, y_step;  // bytes between tiles of K
  int64_t m;
  float *out;
  int64_t stride;
};

// Rows [row, row + 32) of a product's, as many as there are.
inline Rows rows_from(const Product &a, int64_t row, float *out) {
  const int64_t left = a.m - row, row_bytes = 64 * tiles(a.k);
  const auto x = static_cast<const uint8_t *>(a.rows[0]) + row * row_bytes;
  const int64_t first = left < 16 ? left : 16, second = left - first < 16 ? left - first : 16;
  return {x, x + 16 * row_bytes, 64 * first, 64 * second, first + second, out + row * a.stride, a.stride};
}

// At most 16 R rows: every tile is decoded a little before it is multiplied, so that both kinds of work overlap.
template <int kFormat, int R, int P>
void together(const uint8_t *const *panels, const uint8_t *const *scales, int64_t tiles, const Rows &r, uint8_t *scratch) {
  constexpr int64_t kLag = 2, kRing = 4;
  const Decoder<kFormat> decoder;
  float *sums = reinterpret_cast<float *>(scratch + 2 * kChunk * kTile);
  configure(R == 1 ? r.m : 16, R == 1 ? 0 : r.m - 16);
  zero<R, P>();
  for (int64_t t = 0; t < tiles + kLag; ++t) {
    const int64_t now = t - kLag;
    const uint8_t *w = scratch + now % kRing * P * kTile;
    uint8_t *next = scratch + t % kRing * P * kTile;
    if (now >= 0) load_rows<R>(r.x + now * r.x_step, r.y + now * r.y_step);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if (t < tiles) decoder.tile(panels[p], scales[p], t, next + p * kTile);
      fence();
      if (now >= 0) multiply_panel<R>(p, w + p * kTile);
    }
    if (now < 0) continue;
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      if (now % 4 != 3 && now + 1 < tiles) continue;
      float scale[P];
      for (int p = 0; p < P; ++p) scale[p] = reinterpret_cast<const float *>(scales[p])[now / 4];
      store<R, P>(sums, 16 * P);
      add_scaled<P>(sums, r.m, scale, now < 4, r.out, r.stride);
      zero<R, P>();
    }
  }
  if constexpr (kFormat != MS_FP8_BLOCK128) store<R, P>(r.out, r.stride);
}

template <int kFormat, int R, int P>
void steps(const uint8_t *w, const uint8_t *const *scales, int64_t tile, int64_t tiles, const Rows &r, float *sums) {
  const uint8_t *x = r.x + tile * r.x_step, *y = r.y + tile * r.y_step;
  if constexpr (kFormat == MS_FP8_BLOCK128) {
    for (int64_t t = 0; t < tiles; t += 4) {
      zero<R, P>();
      for (int64_t i = t; i < t + 4 && i < tiles; ++i) multiply<R, P>(x + i * r.x_step, y + i * r.y_step, w + i * P * kTile);
      float scale[P];
      for (int p = 0; p < P; ++p) scale[p] = reinterpret_cast<const float *>(scales[p])[(tile + t) / 4];
      store<R, P>(sums, 16 * P);
      add_scaled<P>(sums, r.m, scale, tile + t == 0, r.out, r.stride);
    }
  } else {
    if (tile)
      load<R, P>(r.out, r.stride);
    else
      zero<R, P>();
    for (int64_t i = 0; i < tiles; ++i) multiply<R, P>(x + i * r.x_step, y + i * r.y_step, w + i * P * kTile);
    store<R, P>(r.out, r.stride);
  }
}

// More rows: a chunk of K is decoded once and stays in L1 for all of them.
template <int kFormat, int P>
void apart(const uint8_t *const *panels, const uint8_t *const *scales, int64_t tiles, const Product &a, float *out,
           uint8_t *scratch) {
  const Decoder<kFormat> decoder;
  float *sums = reinterpret_cast<float *>(scratch + 2 * kChunk * kTile);
  for (int64_t tile = 0; tile < tiles; tile += kChunk) {
    const int64_t now = tiles - tile < kChunk ? tiles - tile : kChunk;
    for (int64_t t = 0; t < now; ++t)
      for (int p = 0; p < P; ++p) decoder.tile(panels[p], scales[p], tile + t, scratch + (t * P + p) * kTile);
    fence();
    configure(16, 16);
    for (int64_t row = 0; row < a.m; row += 32) {
      const Rows r = rows_from(a, row, out);
      if (r.m <= 16) {
        configure(r.m, 0);
        steps<kFormat, 1, P>(scratch, scales, tile, now, r, sums);
      } else {
        if (r.m < 32) configure(16, r.m - 16);
        steps<kFormat, 2, P>(scratch, scales, tile, now, r, sums);
      }
    }
  }
}

template <int kFormat>
void product(const Product *a) {
  const int64_t size = panel_bytes(kFormat, a->k), where = scales_offset(kFormat, a->k), all = tiles(a->k);
  const auto scratch = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(a->scratch) + 63) / 64 * 64);
  for (int64_t p = 0; p < a->count;) {
    const uint8_t *panels[4], *scales[4];
    for (int i = 0; i < 4; ++i) {
      panels[i] = a->panels + (a->first + p + i) * size;
      scales[i] = panels[i] + where;
    }
    const int64_t left = a->count - p;
    float *out = a->out + 16 * p;
    const Rows r = rows_from(*a, 0, out);
    if (a->m <= 16) {
      if (left >= 4) {
        together<kFormat, 1, 4>(panels, scales, all, r, scratch);
        p += 4;
      } else if (left >= 2) {
        together<kFormat, 1, 2>(panels, scales, all, r, scratch);
        p += 2;
      } else {
        together<kFormat, 1, 1>(panels, scales, all, r, scratch);
        p += 1;
      }
    } else if (a->m <= 32) {
      if (left >= 2)
        together<kFormat, 2, 2>(panels, scales, all, r, scratch);
      else
        together<kFormat, 2, 1>(panels, scales, all, r, scratch);
      p += left >= 2 ? 2 : 1;
    } else {
      if (left >= 2)
        apart<kFormat, 2>(panels, scales, all, *a, out, scratch);
      else
        apart<kFormat, 1>(panels, scales, all, *a, out, scratch);
      p += left >= 2 ? 2 : 1;
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
