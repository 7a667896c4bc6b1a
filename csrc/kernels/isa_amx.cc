// AMX with bfloat16 tiles: weights are decoded with their scales into tiles of 16 columns x 32 k, which rows share.
// A row's sum runs through all of K in one tile (block FP8: through each block of 128), in the same order for one row
// as for a thousand, so the result is the same to the bit. More than 16 rows are in whole tiles of 16: what lies behind
// the last row may be anything, and so may what is stored there.
#include "amx_decode.h"
#include "amx_tiles.h"
#include "rows.h"
#include "table.h"

namespace microscale {
namespace {

constexpr int64_t kAhead = 16384;  // bytes that codes are fetched ahead: what comes in while memory answers
constexpr int64_t kBehind = 4;     // tiles between decoding and multiplication
// Of P panels: steps between decoding and multiplication, and slots for decoded steps.
template <int P>
constexpr int64_t kLag = (kBehind + P - 1) / P;
template <int P>
constexpr int64_t kRing = kLag<P> + 2;
constexpr int64_t kTiles = kBehind + 3 * kGroupPanels;
constexpr int64_t kSums = 6 * 16 * 64;
constexpr int64_t kScratch = kTiles * kTile + kSums;

// Neighbouring panels of one group.
struct Panels {
  const uint8_t *codes, *scales;
  int64_t step, scale_step, next_scales;  // next_scales: from one panel's scales to the next panel's
  const uint8_t *next;                    // what is read after them
  int64_t code_bytes, scale_bytes;        // of theirs in a step
  int64_t ahead;                          // steps

  Panels(int format, const Product &a, int64_t panel, int64_t count) {
    const PanelPlace at = panel_place(format, a.n, a.k, panel);
    codes = a.weights + at.codes;
    scales = a.weights + at.scales;
    step = at.step;
    scale_step = at.scale_step;
    next_scales = scale_step ? tile_scale_bytes(format) : panel_scale_bytes(format, a.k);
    code_bytes = count * tile_bytes(format);
    scale_bytes = count * tile_scale_bytes(format);
    ahead = kAhead / step + 1;
    const bool last = panel + count == a.first + a.count;
    next = last ? a.next : a.weights + panel_place(format, a.n, a.k, panel + count).codes;
  }
  float scale(int p, int64_t tile) const {  // block FP8
    return reinterpret_cast<const float *>(scales + p * next_scales)[tile / 4];
  }
  // One step, some steps before it is needed.
  inline __attribute__((always_inline)) void fetch(int64_t tile, int64_t tiles) const {
    const bool here = tile + ahead < tiles;
    const uint8_t *from = here ? codes + (tile + ahead) * step : next + (tile + ahead - tiles) * step;
    fetch(from, code_bytes);
    if (scale_step) fetch(from + (scales - codes), scale_bytes);
  }
  // Inlined by force: GCC takes a function that only prefetches for one without effect, and drops its calls.
  static inline __attribute__((always_inline)) void fetch(const uint8_t *from, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(from) / 64 * 64, end = reinterpret_cast<uintptr_t>(from) + bytes;
    for (uintptr_t at = first; at < end; at += 64) _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T1);
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
  zero<R>();
}

// P panels times R tiles of rows, all of K. Every tile of weights is decoded a little before it is multiplied, so that
// both kinds of work overlap. kFetch: the weights come from memory, and are fetched ahead.
template <int kFormat, int R, int P, bool kFetch>
void rows_times(const Panels &panels, const Rows<R> &r, int64_t tiles, uint8_t *decoded, float *sums) {
  constexpr bool kBlockScales = kFormat == MS_FP8_BLOCK128;
  const Decoder<kFormat> decoder;
  zero<R>();
  int64_t slot = 0, slot_now = 0;
  for (int64_t t = 0; t < tiles + kLag<P>; ++t) {
    const int64_t now = t - kLag<P>;
    const uint8_t *w = decoded + slot_now * P * kTile;
    uint8_t *to = decoded + slot * P * kTile;
    if (now >= 0) begin(r, now);
    if (kFetch && t < tiles) panels.fetch(t, tiles);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if (t < tiles) panels.decode(decoder, p, t, to + p * kTile);
      fence();
      if (now < 0) continue;
      if constexpr (R < 3) {
        panel<R>(p, w + p * kTile);
      } else {
        if (p == 0) first_half<P>(r, now, w);
        if (p == P - 1) second_half<P>(r, now, w);
      }
    }
    slot = slot + 1 == kRing<P> ? 0 : slot + 1;
    if (now < 0) continue;
    slot_now = slot_now + 1 == kRing<P> ? 0 : slot_now + 1;
    if (kBlockScales && (now % 4 == 3 || now + 1 == tiles)) end_block<kFormat, R, P>(panels, now, r, sums);
  }
  if (!kBlockScales) store<R, P>(r.out, r.stride);
}

// At most 16 rows: up to four panels at a time keep the products of one row tile apart.
template <int kFormat, int P>
void few(const Product &a, int64_t panel, float *out, uint8_t *scratch, float *sums) {
  const Panels panels(kFormat, a, panel, P);
  rows_times<kFormat, 1, P, true>(panels, Rows<1>(a, 0, out), tiles(a.k), scratch, sums);
}

// More: two panels times up to three row tiles, so that each tile loaded serves two or three products. Weights are
// decoded once for every 48 rows, while the matrix unit works: to decode them once for all rows they would have to go
// through L2, which takes longer.
template <int kFormat, int P>
void many(const Product &a, int64_t panel, float *out, uint8_t *scratch, float *sums) {
  const Panels panels(kFormat, a, panel, P);
  const int64_t all = tiles(a.k);
  int64_t row = a.m > 32 ? 48 : 32;
  if (a.m > 32)
    rows_times<kFormat, 3, P, true>(panels, Rows<3>(a, 0, out), all, scratch, sums);
  else
    rows_times<kFormat, 2, P, true>(panels, Rows<2>(a, 0, out), all, scratch, sums);
  for (; row + 32 < a.m; row += 48) rows_times<kFormat, 3, P, false>(panels, Rows<3>(a, row, out), all, scratch, sums);
  if (row + 16 < a.m)
    rows_times<kFormat, 2, P, false>(panels, Rows<2>(a, row, out), all, scratch, sums);
  else if (row < a.m)
    rows_times<kFormat, 1, P, false>(panels, Rows<1>(a, row, out), all, scratch, sums);
}

template <int kFormat>
void product(const Product *a) {
  const auto scratch = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(a->scratch) + 63) / 64 * 64);
  float *sums = reinterpret_cast<float *>(scratch + kTiles * kTile);
  configure(a->m < 16 ? a->m : 16);
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
