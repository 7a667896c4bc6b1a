// AMX with bfloat16 tiles: weights are decoded with their scales into tiles of 16 columns x 32 k, which rows share.
// A row's sum runs through all of K in one tile (block FP8: through each block of 128), in the same order for one row
// as for a thousand, so the result is the same to the bit. More than 16 rows are in several tiles of equally many: what
// lies behind the last row may be anything, and so may what is stored there.
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
constexpr int64_t above(int64_t lag) { return lag < 2 ? 2 : lag < 4 ? 4 : 8; }
template <int P>
constexpr int64_t kRing = above(kLag<P>);
constexpr int64_t kTiles = 12;
static_assert(kTiles >= kRing<1> && kTiles >= 2 * kRing<2> && kTiles >= 3 * kRing<3> && kTiles >= 4 * kRing<4>);
constexpr int64_t kSums = 4 * 16 * 64;
constexpr int64_t kTogether = 1 << 18;  // bytes of weights that each tile of rows meets before the next
constexpr int64_t kScratch = kTiles * kTile + kSums;

// P neighbouring panels of one group, which are read step by step.
template <int kFormat, int P>
struct Panels {
  static constexpr int64_t kCodes = tile_bytes(kFormat), kScales = tile_scale_bytes(kFormat);
  const uint8_t *codes, *scales;
  int64_t step, scale_step, next_scales;  // next_scales: from one panel's scales to the next panel's
  const uint8_t *next;                    // what is read after them
  const uint8_t *next_group;              // after their group; null where not all of that is multiplied
  int64_t pass;                           // of those through their group, if there are P panels in each

  Panels(const Product &a, int64_t panel) {
    const PanelPlace at = panel_place(kFormat, a.n, a.k, panel);
    codes = a.weights + at.codes;
    scales = a.weights + at.scales;
    step = at.step;
    scale_step = at.scale_step;
    next_scales = kScales ? kScales : panel_scale_bytes(kFormat, a.k);
    const bool last = panel + P == a.first + a.count;
    next = last ? a.next : a.weights + panel_place(kFormat, a.n, a.k, panel + P).codes;
    const int64_t end = a.first + a.count, within = panel % kGroupPanels, after = panel - within + kGroupPanels;
    const bool whole = panel - within >= a.first && after <= end;
    next_group = !whole ? nullptr : after == end ? a.next : a.weights + panel_place(kFormat, a.n, a.k, after).codes;
    pass = within / P;
  }
  float scale(int p, int64_t tile) const {  // block FP8
    return reinterpret_cast<const float *>(scales + p * next_scales)[tile / 4];
  }
  template <int kQuarter>
  MS_INLINE void decode(const Decoder<kFormat> &decoder, int p, int64_t tile, typename Decoder<kFormat>::Change &change,
                        uint8_t *out) const {
    decoder.template quarter<kQuarter>(codes + tile * step + p * kCodes, scales + tile * scale_step + p * next_scales,
                                       change, out);
  }
};

// Asks for the panels' steps before they are needed, and behind the last for the first ones of what is read next.
// Where a group takes several passes, each asks for its share of the next group, from the first byte to the last:
// so memory is read at the same pace in all of them, and in the order in which it lies.
template <int kFormat, int P>
struct Fetch {
  const uint8_t *at, *next;
  int64_t step, scales, left;  // scales: from codes to scales; left: steps of these panels

  Fetch(const Panels<kFormat, P> &panels, int64_t tiles, bool passes) : next(panels.next), step(panels.step) {
    if (passes && panels.next_group) {
      scales = P * tile_bytes(kFormat);  // what each step takes beside as many bytes of codes
      step = scales + P * tile_scale_bytes(kFormat);
      at = panels.next_group + panels.pass * tiles * step;
      left = tiles + 1;
      return;
    }
    const int64_t ahead = kAhead / step + 1;
    left = tiles - ahead;
    at = left > 0 ? panels.codes + ahead * step : next - left * step;
    scales = panels.scales - panels.codes;
  }
  // A quarter of panel p's step: many lines at once would take all the buffers that loads wait in.
  // Inlined by force: GCC takes a function that only prefetches for one without effect, and drops its calls.
  template <int kQuarter>
  MS_INLINE void quarter(int p) const {
    constexpr int64_t kLines = tile_bytes(kFormat) / 64, kFrom = kQuarter * kLines / 4;
    lines<(kQuarter + 1) * kLines / 4 - kFrom>(at + p * tile_bytes(kFormat) + 64 * kFrom);
    if (p == 0 && kQuarter == 0) lines<(P * tile_scale_bytes(kFormat) + 63) / 64>(at + scales);
  }
  MS_INLINE void advance() { at = --left == 0 ? next : at + step; }
  template <int64_t kCount>
  static MS_INLINE void lines(const uint8_t *from) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kCount; ++i) _mm_prefetch(reinterpret_cast<const char *>(from + 64 * i), _MM_HINT_T1);
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
inline void end_block(const Panels<kFormat, P> &panels, int64_t tile, const Rows<R> &r, float *sums) {
  float scale[P];
  for (int p = 0; p < P; ++p) scale[p] = panels.scale(p, tile);
  store<R, P>(sums, r.each, 64 * P);
  add_scaled<P>(sums, r.m, scale, tile < 4, r.out, r.stride / 4);
  zero<R * P>();
}

// Product i of a step, and the loads of the next.
template <int kFormat, int R, int P, int i>
MS_INLINE void product_of_step(const Panels<kFormat, P> &panels, const Rows<R> &rows, int64_t tiles, int64_t t,
                               const uint8_t *weights, float *sums) {
  multiply_tiles<i / P * P + panel_of<P>(i)>();
  if constexpr (i + 1 < R * P) loads_of_step<R, P, i + 1>(rows, t, weights);
  if (kFormat == MS_FP8_BLOCK128 && i == R * P - 1 && (t % 4 == 3 || t + 1 == tiles))
    end_block<kFormat, R, P>(panels, t, rows, sums);
  fence();
}

// Decodes step t to `to`, if kDecode, and multiplies step `now` by `weights`, if kMultiply: products are spread among
// the quarters of the tiles that are decoded, which both kinds of work overlap better by than in blocks, and tiles are
// loaded right behind the product before. What is at hand is passed on by reference to what is inlined; closures that
// hold closures would keep it in memory.
template <int kFormat, int R, int P, bool kFetch, bool kDecode, bool kMultiply, int kQuarter = 0>
MS_INLINE void step(const Panels<kFormat, P> &panels, const Rows<R> &rows, int64_t tiles,
                    const Decoder<kFormat> &decoder, typename Decoder<kFormat>::Change &change,
                    Fetch<kFormat, P> &fetch, int64_t t, int64_t now, uint8_t *to, const uint8_t *weights,
                    float *sums) {
  if constexpr (kQuarter < 4 * P) {
    constexpr int p = kQuarter / 4, product = kQuarter * R / 4;
    if constexpr (kMultiply && kQuarter == 0) {
      loads_of_step<R, P, 0>(rows, now, weights);
      fence();
    }
    if constexpr (kDecode) {
      panels.template decode<kQuarter % 4>(decoder, p, t, change, to + p * kTile);
      if constexpr (kFetch) fetch.template quarter<kQuarter % 4>(p);
      fence();
    }
    if constexpr (kMultiply && product < (kQuarter + 1) * R / 4)
      product_of_step<kFormat, R, P, product>(panels, rows, tiles, now, weights, sums);
    step<kFormat, R, P, kFetch, kDecode, kMultiply, kQuarter + 1>(panels, rows, tiles, decoder, change, fetch, t, now,
                                                                  to, weights, sums);
  } else if constexpr (kDecode) {
    fetch.advance();
  }
}

// P panels times R tiles of rows, all of K. Every tile of weights is decoded a little before it is multiplied, so that
// both kinds of work overlap. kFetch: the weights come from memory, and are fetched ahead.
template <int kFormat, int R, int P, bool kFetch>
void rows_times(const Panels<kFormat, P> &all_panels, const Rows<R> &all_rows, int64_t tiles, uint8_t *ring,
                float *sums) {
  constexpr int64_t kStep = P * kTile, kMask = kRing<P> - 1, kLate = kLag<P>;
  const Panels<kFormat, P> panels = all_panels;  // copies stay in registers
  const Rows<R> rows = all_rows;
  Decoder<kFormat> decoder;
  decoder.codes.keep_in_registers();
  Fetch<kFormat, P> fetch(panels, tiles, R > 1);
  typename Decoder<kFormat>::Change change;
  zero<R * P>();
  const int64_t lead = tiles < kLate ? tiles : kLate;
  int64_t t = 0;
  for (; t < lead; ++t)
    step<kFormat, R, P, kFetch, true, false>(panels, rows, tiles, decoder, change, fetch, t, 0,
                                             ring + (t & kMask) * kStep, nullptr, sums);
  for (; t < tiles; ++t)
    step<kFormat, R, P, kFetch, true, true>(panels, rows, tiles, decoder, change, fetch, t, t - kLate,
                                            ring + (t & kMask) * kStep, ring + ((t - kLate) & kMask) * kStep, sums);
  for (t = tiles - lead; t < tiles; ++t)
    step<kFormat, R, P, kFetch, false, true>(panels, rows, tiles, decoder, change, fetch, 0, t, nullptr,
                                             ring + (t & kMask) * kStep, sums);
  if (kFormat != MS_FP8_BLOCK128) store<R, P>(rows.out, rows.each, rows.stride);
}

// At most 16 rows: up to four panels at a time keep the products of one row tile apart.
template <int kFormat, int P>
void few(const Product &a, int64_t panel, float *out, uint8_t *scratch, float *sums) {
  const Panels<kFormat, P> panels(a, panel);
  rows_times<kFormat, 1, P, true>(panels, Rows<1>(a, 0, out), tiles(a.k), scratch, sums);
}

// More: tiles of rows by twos, times two panels, so that each tile loaded serves two products and six tiles are enough;
// of an odd number the first three, times one panel. Weights are decoded again for each, while the matrix unit works:
// to decode them once for all rows they would have to go through L2, which takes longer.
template <int kFormat, int P, bool kFetch>
void two(const Product &a, int64_t panel, int64_t tile, float *out, uint8_t *scratch, float *sums) {
  const Panels<kFormat, P> panels(a, panel);
  rows_times<kFormat, 2, P, kFetch>(panels, Rows<2>(a, tile, out), tiles(a.k), scratch, sums);
}
template <int kFormat, int P, bool kFetch>
void three(const Product &a, int64_t panel, int64_t tile, float *out, uint8_t *scratch, float *sums) {
  for (int p = 0; p < P; ++p) {
    const Panels<kFormat, 1> panels(a, panel + p);
    rows_times<kFormat, 3, 1, kFetch>(panels, Rows<3>(a, tile, out + 16 * p), tiles(a.k), scratch, sums);
  }
}
// Panels [panel, end) times two or three tiles of rows.
template <int kFormat, bool kFetch>
void tiles_times(const Product &a, int64_t panel, int64_t end, int64_t tile, bool is_three, uint8_t *scratch,
                 float *sums) {
  for (int64_t count; panel < end; panel += count) {
    float *out = a.out + 16 * (panel - a.first);
    count = panel % kGroupPanels + 1 < kGroupPanels && panel + 1 < end ? 2 : 1;  // of the same group
    if (is_three && count == 2)
      three<kFormat, 2, kFetch>(a, panel, tile, out, scratch, sums);
    else if (is_three)
      three<kFormat, 1, kFetch>(a, panel, tile, out, scratch, sums);
    else if (count == 2)
      two<kFormat, 2, kFetch>(a, panel, tile, out, scratch, sums);
    else
      two<kFormat, 1, kFetch>(a, panel, tile, out, scratch, sums);
  }
}
// Some groups of panels, as many as fit into the L2 beside tiles of rows, take all rows before the next ones do: rows
// are most of what goes through the caches, and two tiles of them stay in the L2 for all of these panels.
template <int kFormat>
void many(const Product &a, uint8_t *scratch, float *sums) {
  const int64_t fit = kTogether / group_bytes(kFormat, a.k, kGroupPanels), groups = fit < 1 ? 1 : fit;
  const int64_t count = (a.m + 15) / 16, behind = a.first + a.count;  // two tiles of rows and more
  for (int64_t panel = a.first, end; panel < behind; panel = end) {
    end = (panel / kGroupPanels + groups) * kGroupPanels;
    if (end > behind) end = behind;
    int64_t tile = 2 + count % 2;
    tiles_times<kFormat, true>(a, panel, end, 0, tile == 3, scratch, sums);
    for (; tile < count; tile += 2) tiles_times<kFormat, false>(a, panel, end, tile, false, scratch, sums);
  }
}

template <int kFormat>
void product(const Product *a) {
  const auto scratch = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(a->scratch) + 63) / 64 * 64);
  float *sums = reinterpret_cast<float *>(scratch + kTiles * kTile);
  // Rows that tiles are configured for: loading a configuration takes as long as some tiles of weights.
  const int rows = static_cast<int>(tile_rows(a->m));
  if (*a->state != rows) configure(rows);
  *a->state = rows;
  if (a->m > 16) return many<kFormat>(*a, scratch, sums);
  for (int64_t p = 0; p < a->count;) {
    const int64_t panel = a->first + p, group = kGroupPanels - panel % kGroupPanels;
    const int64_t left = a->count - p < group ? a->count - p : group;
    float *out = a->out + 16 * p;
    switch (left) {
      case 4: few<kFormat, 4>(*a, panel, out, scratch, sums); break;
      case 3: few<kFormat, 3>(*a, panel, out, scratch, sums); break;
      case 2: few<kFormat, 2>(*a, panel, out, scratch, sums); break;
      default: few<kFormat, 1>(*a, panel, out, scratch, sums);
    }
    p += left;
  }
}

void end() { _tile_release(); }

}  // namespace

extern const Kernels amx_kernels = {
    MS_BF16,
    1,
    kScratch + 64,
    {product<MS_MXFP4>, product<MS_MXFP6_E2M3>, product<MS_MXFP6_E3M2>, product<MS_MXFP8_E4M3>, product<MS_MXFP8_E5M2>,
     product<MS_MXINT8>, product<MS_NVFP4>, product<MS_FP8_BLOCK128>},
    end,
    activate_rows<MS_BF16>,
    load_row<MS_BF16>,
    add_row,
    store_row,
};

}  // namespace microscale
