// The product of rows and packed weights, one algorithm for every level. `V` is a level's vectors, `D` a format's
// decoder for them; both are defined by the unit that includes this.
//
// Every block of weights is summed on its own, in order of k, and its sum is then multiplied by the block's scale and
// added to the total. So a decoder need not know scales, any scale is exact, and whether a tile was decoded for one row
// or for a thousand, a row's result is the same to the bit. `D::order`: decoders may give every eight steps in another
// order, and all paths take that one; order(i) is the i-th of the eight.
#pragma once
#include "inline.h"
#include "table.h"
#include "../layout.h"

namespace microscale {
namespace {

// Q units' share of one tile, added to their totals. A unit is the columns of a panel that are summed together.
template <class V, class D, int R, int Q, bool kSpecial>
inline void units_of_tile(const D &decoder, const uint8_t *const *codes, const uint8_t *const *scales, int64_t tile,
                          const typename V::Operand *const *x, typename V::Total (*total)[R]) {
  // Or the compiler would load the tile's operands once for all units, and keep them on the stack.
  __asm__ volatile("" ::: "memory");
  for (int block = 0; block < D::kBlocks; ++block) {
    typename V::Sum sum[Q][R];
    for (int q = 0; q < Q; ++q)
      for (int r = 0; r < R; ++r) sum[q][r] = V::no_sum();
#pragma GCC unroll 8
    for (int part = block * D::kParts / D::kBlocks; part < (block + 1) * D::kParts / D::kBlocks; ++part)
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
        decoder.template steps<kSpecial>(codes[q], part, [&](int step, const typename V::Weights &w) {
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) V::multiply(sum[q][r], w, x[r] + V::kStep * step);
        });
    for (int q = 0; q < Q; ++q) {
      const auto scale = D::template scale<kSpecial>(scales[q], tile, block);
      for (int r = 0; r < R; ++r) V::template add_block<D, kSpecial>(total[q][r], sum[q][r], scale);
    }
  }
}

// Asks for bytes from `from` on, into the L2 cache: a core can wait for far fewer lines of its L1, and stops when it
// has asked for as many. Inlined by force: GCC takes a function that only prefetches for pure, and deletes its calls.
MS_INLINE void prefetch(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Asks for what is read some 8 KB after `panels` panels' tile, and near their end for the first of what is read next.
template <class D>
MS_INLINE void fetch(const PanelPlace &at, int64_t panels, const uint8_t *weights, int64_t tile, int64_t tiles,
                     const uint8_t *next) {
  constexpr int64_t kAhead = (8 << 10) / tile_step(D::kFormat, kGroupPanels);
  constexpr int64_t kScales = tile_scale_bytes(D::kFormat);
  const int64_t left = tiles - tile - kAhead;
  const uint8_t *codes = left > 0 ? weights + at.codes + (tile + kAhead) * at.step : next - left * at.step;
  prefetch(codes, panels * D::kTileBytes);
  if constexpr (kScales != 0) prefetch(codes + (at.scales - at.codes), panels * kScales);
}

// Few rows: they share each decoded vector while it is in a register. All panels of a group go through a tile before
// the next one, as they lie in memory, Q units at a time, so that enough sums are under way to hide the latency of a
// multiplication.
template <class V, class D, int R, bool kSpecial>
void direct(const PanelPlace *at, int64_t panels, const uint8_t *weights, int64_t tiles, const uint8_t *next,
            const typename V::Operand *const *rows, float *out, int64_t stride) {
  constexpr int kMost = kGroupPanels * V::kUnits, Q = V::at_once(R, D::kBlocks, traits(D::kFormat).bits);
  typename V::Total total[kMost][R];
  const typename V::Operand *x[R];
  const uint8_t *codes[kMost], *scales[kMost];
  const int units = static_cast<int>(panels) * V::kUnits;
  for (int u = 0; u < units; ++u) {
    const PanelPlace &place = at[u / V::kUnits];
    codes[u] = weights + place.codes + u % V::kUnits * D::kUnitCodes;
    scales[u] = weights + place.scales + u % V::kUnits * D::kUnitScales;
    for (int r = 0; r < R; ++r) total[u][r] = V::no_total();
  }
  for (int r = 0; r < R; ++r) x[r] = rows[r];
  const D decoder{};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    fetch<D>(at[0], panels, weights, tile, tiles, next);
    int u = 0;
    if constexpr (Q > 1)
      for (; u + Q <= units; u += Q)
        units_of_tile<V, D, R, Q, kSpecial>(decoder, codes + u, scales + u, tile, x, total + u);
    for (; u < units; ++u) units_of_tile<V, D, R, 1, kSpecial>(decoder, codes + u, scales + u, tile, x, total + u);
    for (u = 0; u < units; ++u) codes[u] += at[u / V::kUnits].step, scales[u] += at[u / V::kUnits].scale_step;
    for (int r = 0; r < R; ++r) x[r] += 32;
  }
  for (int u = 0; u < units; ++u)
    for (int r = 0; r < R; ++r) V::template store<D>(out + r * stride + 16 / V::kUnits * u, total[u][r]);
}

template <class V, class D, int R, bool kSpecial>
void direct_rows(int64_t count, const PanelPlace *at, int64_t panels, const Product &a,
                 const typename V::Operand *const *rows, float *out) {
  if constexpr (R > 1)
    if (count < R) return direct_rows<V, D, R - 1, kSpecial>(count, at, panels, a, rows, out);
  direct<V, D, R, kSpecial>(at, panels, a.weights, tiles(a.k), a.next, rows, out, a.stride);
}

// Up to V::few rows, measured: as few groups of them as possible, all of about the same size, of which each decodes
// anew, from a cache.
template <class V, class D, bool kSpecial>
void few_rows(const Product &a, const PanelPlace *at, int64_t panels, float *out) {
  const auto rows = reinterpret_cast<const typename V::Operand *const *>(a.rows);
  const int64_t groups = (a.m + V::kRows - 1) / V::kRows;
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t count = (a.m - row) / (groups - g);
    direct_rows<V, D, V::kRows, kSpecial>(count, at, panels, a, rows + row, out + row * a.stride);
    row += count;
  }
}

// R rows times one unit's tile that was decoded to `w`.
template <class V, class D, int R, bool kSpecial>
inline void staged_rows(int64_t count, const typename V::Weights *w, const typename V::Scale *scale,
                        const typename V::Operand *const *rows, int64_t k, typename V::Total *total) {
  if constexpr (R > 1)
    if (count < R) return staged_rows<V, D, R - 1, kSpecial>(count, w, scale, rows, k, total);
  constexpr int kSteps = 32 / V::kStep / D::kBlocks;
  const typename V::Operand *x[R];
  for (int r = 0; r < R; ++r) x[r] = rows[r] + k;
  for (int block = 0; block < D::kBlocks; ++block, w += kSteps) {
    typename V::Sum sum[R];
    for (int r = 0; r < R; ++r) sum[r] = V::no_sum();
    for (int eight = 0; eight < kSteps; eight += 8)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int step = eight + D::order(i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) V::multiply(sum[r], w[step], x[r] + V::kStep * step);
      }
    for (int r = 0; r < R; ++r) {
      x[r] += V::kStep * kSteps;
      V::template add_block<D, kSpecial>(total[r], sum[r], scale[block]);
    }
  }
}

// More rows, where registers are few: each tile of a unit is decoded into the L1 cache, which the decoder's constants
// then need no registers for, and used by at most kBlockRows rows.
template <class V, class D, bool kSpecial>
void staged(const PanelPlace *at, int64_t panels, const Product &a, int64_t first, int64_t count, float *out) {
  const auto rows = reinterpret_cast<const typename V::Operand *const *>(a.rows) + first;
  const int units = static_cast<int>(panels) * V::kUnits;
  const int64_t groups = (count + V::kStagedRows - 1) / V::kStagedRows;
  typename V::Total total[kGroupPanels * V::kUnits][V::kBlockRows];
  typename V::Weights w[32 / V::kStep];
  typename V::Scale scale[D::kBlocks];
  for (int u = 0; u < units; ++u)
    for (int64_t r = 0; r < count; ++r) total[u][r] = V::no_total();
  const D decoder{};
  for (int64_t tile = 0; tile < tiles(a.k); ++tile) {
    fetch<D>(at[0], panels, a.weights, tile, tiles(a.k), a.next);
    for (int u = 0; u < units; ++u) {
      const PanelPlace &place = at[u / V::kUnits];
      const int unit = u % V::kUnits;
      const uint8_t *codes = a.weights + place.codes + tile * place.step + unit * D::kUnitCodes;
      const uint8_t *scales = a.weights + place.scales + tile * place.scale_step + unit * D::kUnitScales;
#pragma GCC unroll 8
      for (int part = 0; part < D::kParts; ++part)
        decoder.template steps<kSpecial>(codes, part, [&](int step, const typename V::Weights &v) { w[step] = v; });
      for (int block = 0; block < D::kBlocks; ++block) scale[block] = D::template scale<kSpecial>(scales, tile, block);
      for (int64_t g = 0, row = 0; g < groups; ++g) {
        const int64_t some = (count - row) / (groups - g);
        staged_rows<V, D, V::kStagedRows, kSpecial>(some, w, scale, rows + row, 32 * tile, total[u] + row);
        row += some;
      }
    }
  }
  for (int u = 0; u < units; ++u)
    for (int64_t r = 0; r < count; ++r)
      V::template store<D>(out + (first + r) * a.stride + 16 / V::kUnits * u, total[u][r]);
}

// R rows times P panels of decoded tiles; the totals so far are in `out`.
template <class V, class D, int R, int P, bool kSpecial>
void decoded(const typename V::Weights *w, const PanelPlace *at, const uint8_t *weights, int64_t tile, int64_t tiles,
             const typename V::Operand *const *rows, float *out, int64_t stride) {
  constexpr int kSteps = 32 / V::kStep / D::kBlocks;
  typename V::Total total[R][P];
  const typename V::Operand *x[R];
  const uint8_t *scales[P];
  for (int p = 0; p < P; ++p) scales[p] = weights + at[p].scales + tile * at[p].scale_step;
  for (int r = 0; r < R; ++r) {
    x[r] = rows[r] + 32 * tile;
    for (int p = 0; p < P; ++p) total[r][p] = tile ? V::load(out + r * stride + 16 * p) : V::no_total();
  }
  for (int64_t t = tile; t < tile + tiles; ++t) {
    for (int block = 0; block < D::kBlocks; ++block) {
      typename V::Sum sum[R][P];
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sum[r][p] = V::no_sum();
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; ++step, w += P)
        for (int r = 0; r < R; ++r)
          for (int p = 0; p < P; ++p) V::multiply(sum[r][p], w[p], x[r] + V::kStep * step);
      for (int r = 0; r < R; ++r) x[r] += V::kStep * kSteps;
      for (int p = 0; p < P; ++p) {
        const auto scale = D::template scale<kSpecial>(scales[p], t, block);
        for (int r = 0; r < R; ++r) V::template add_block<D, kSpecial>(total[r][p], sum[r][p], scale);
      }
    }
    for (int p = 0; p < P; ++p) scales[p] += at[p].scale_step;
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) V::template store<D>(out + r * stride + 16 * p, total[r][p]);
}

template <class V, class D, int P, bool kSpecial>
void decode(const Product &a, const PanelPlace *at, int64_t tile, int64_t tiles, typename V::Weights *w) {
  const D decoder{};
  for (int64_t t = tile; t < tile + tiles; ++t, w += P * (32 / V::kStep)) {
    fetch<D>(at[0], P, a.weights, t, microscale::tiles(a.k), a.next);
    for (int p = 0; p < P; ++p)
      for (int part = 0; part < D::kParts; ++part)
        decoder.template steps<kSpecial>(a.weights + at[p].codes + t * at[p].step, part,
                                         [&](int step, const typename V::Weights &v) { w[step * P + p] = v; });
  }
}

template <class V, class D, int P, bool kSpecial>
void many_rows(const Product &a, const PanelPlace *at, float *out) {
  constexpr int kRows = V::kDecodedRows;
  constexpr int64_t kTileScratch = sizeof(typename V::Weights) * (32 / V::kStep) * P;
  const int64_t tiles = microscale::tiles(a.k), chunk = V::kScratch / kTileScratch;
  const auto rows = reinterpret_cast<const typename V::Operand *const *>(a.rows);
  const auto w = static_cast<typename V::Weights *>(a.scratch);
  for (int64_t tile = 0; tile < tiles; tile += chunk) {
    const int64_t now = tiles - tile < chunk ? tiles - tile : chunk;
    decode<V, D, P, kSpecial>(a, at, tile, now, w);
    // As few groups as possible, all of about the same size.
    const int64_t groups = (a.m + kRows - 1) / kRows;
    for (int64_t g = 0, row = 0; g < groups; ++g) {
      const int64_t count = (a.m - row) / (groups - g);
      const auto x = rows + row;
      float *o = out + row * a.stride;
      switch (count) {
        case 1: decoded<V, D, 1, P, kSpecial>(w, at, a.weights, tile, now, x, o, a.stride); break;
        case 2: decoded<V, D, 2, P, kSpecial>(w, at, a.weights, tile, now, x, o, a.stride); break;
        case 3: decoded<V, D, (kRows >= 3 ? 3 : 1), P, kSpecial>(w, at, a.weights, tile, now, x, o, a.stride); break;
        case 4: decoded<V, D, (kRows >= 4 ? 4 : 1), P, kSpecial>(w, at, a.weights, tile, now, x, o, a.stride); break;
        case 5: decoded<V, D, (kRows >= 5 ? 5 : 1), P, kSpecial>(w, at, a.weights, tile, now, x, o, a.stride); break;
        case 6: decoded<V, D, (kRows >= 6 ? 6 : 1), P, kSpecial>(w, at, a.weights, tile, now, x, o, a.stride); break;
      }
      row += count;
    }
  }
}

template <class V, class D, bool kSpecial>
void product(const Product &all) {
  PanelPlace at[kGroupPanels];
  Product a = all;
  for (int64_t p = 0; p < a.count; p += kGroupPanels) {
    const int64_t panels = a.count - p < kGroupPanels ? a.count - p : kGroupPanels, after = p + panels;
    for (int64_t i = 0; i < panels; ++i) at[i] = panel_place(D::kFormat, a.n, a.k, a.first + p + i);
    a.next = after == a.count ? all.next : a.weights + panel_place(D::kFormat, a.n, a.k, a.first + after).codes;
    float *out = a.out + 16 * p;
    if (a.m <= V::few(D::kBlocks, traits(D::kFormat).bits)) {
      few_rows<V, D, kSpecial>(a, at, panels, out);
    } else if constexpr (V::kScratch == 0) {
      const int64_t groups = (a.m + V::kBlockRows - 1) / V::kBlockRows;
      for (int64_t g = 0, row = 0; g < groups; ++g) {
        const int64_t count = (a.m - row) / (groups - g);
        staged<V, D, kSpecial>(at, panels, a, row, count, out);
        row += count;
      }
    } else {
      int64_t i = 0;
      for (; i + V::kPanels <= panels; i += V::kPanels) many_rows<V, D, V::kPanels, kSpecial>(a, at + i, out + 16 * i);
      for (; i < panels; ++i) many_rows<V, D, 1, kSpecial>(a, at + i, out + 16 * i);
    }
  }
}

template <class V, class D>
void product(const Product *a) {
  if (a->special)
    product<V, D, true>(*a);
  else
    product<V, D, false>(*a);
}

}  // namespace
}  // namespace microscale
