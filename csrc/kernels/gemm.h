// The product of rows and packed weights, one algorithm for every level. `V` is a level's vectors, `D` a format's
// decoder for them; both are defined by the unit that includes this.
//
// Every block of weights is summed on its own, in order of k, and its sum is then multiplied by the block's scale and
// added to the total. So a decoder need not know scales, any scale is exact, and whether a tile was decoded for one row
// or for a thousand, a row's result is the same to the bit. `D::order`: decoders may give a block's steps in another
// order, and every path takes that one; order(i) is the i-th step, and it is its own inverse.
#pragma once
#include "table.h"
#include "../layout.h"

namespace microscale {
namespace {

// Few rows: they share each decoded vector while it is in a register. P panels at a time, so that enough sums are under
// way to hide the latency of a multiplication.
template <class V, class D, int R, int P, bool kSpecial>
void direct(const PanelPlace *at, const uint8_t *weights, int64_t tiles, const typename V::Operand *const *rows,
            float *out, int64_t stride) {
  typename V::Total total[R][P];
  const typename V::Operand *x[R];
  const uint8_t *codes[P], *scales[P];
  for (int p = 0; p < P; ++p) codes[p] = weights + at[p].codes, scales[p] = weights + at[p].scales;
  for (int r = 0; r < R; ++r) {
    x[r] = rows[r];
    for (int p = 0; p < P; ++p) total[r][p] = V::no_total();
  }
  const D decoder{};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int p = 0; p < P; ++p)
      V::prefetch(codes[p] + V::kAhead * at[p].step, D::kTileBytes + tile_scale_bytes(D::kFormat));
    for (int block = 0; block < D::kBlocks; ++block) {
      typename V::Sum sum[R][P];
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sum[r][p] = V::no_sum();
#pragma GCC unroll 8
      for (int part = block * D::kParts / D::kBlocks; part < (block + 1) * D::kParts / D::kBlocks; ++part)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
          decoder.template steps<kSpecial>(codes[p], part, [&](int step, const typename V::Weights &w) {
            for (int r = 0; r < R; ++r) V::multiply(sum[r][p], w, x[r] + V::kStep * step);
          });
      for (int p = 0; p < P; ++p) {
        const auto scale = D::template scale<kSpecial>(scales[p], tile, block);
        for (int r = 0; r < R; ++r) V::template add_block<D, kSpecial>(total[r][p], sum[r][p], scale);
      }
    }
    for (int p = 0; p < P; ++p) codes[p] += at[p].step, scales[p] += at[p].scale_step;
    for (int r = 0; r < R; ++r) x[r] += 32;
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) V::store(out + r * stride + 16 * p, total[r][p]);
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
          for (int p = 0; p < P; ++p) V::multiply(sum[r][p], w[p], x[r] + V::kStep * D::order(step));
      for (int r = 0; r < R; ++r) x[r] += V::kStep * kSteps;
      for (int p = 0; p < P; ++p) {
        const auto scale = D::template scale<kSpecial>(scales[p], t, block);
        for (int r = 0; r < R; ++r) V::template add_block<D, kSpecial>(total[r][p], sum[r][p], scale);
      }
    }
    for (int p = 0; p < P; ++p) scales[p] += at[p].scale_step;
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) V::store(out + r * stride + 16 * p, total[r][p]);
}

template <class V, class D, int P, bool kSpecial>
void decode(const PanelPlace *at, const uint8_t *weights, int64_t tile, int64_t tiles, typename V::Weights *w) {
  const D decoder{};
  for (int64_t t = tile; t < tile + tiles; ++t, w += P * (32 / V::kStep))
    for (int p = 0; p < P; ++p)
      for (int part = 0; part < D::kParts; ++part)
        decoder.template steps<kSpecial>(
            weights + at[p].codes + t * at[p].step, part,
            [&](int step, const typename V::Weights &v) { w[D::order(step) * P + p] = v; });
}

template <class V, class D, int P, bool kSpecial>
void many_rows(const Product &a, const PanelPlace *at, float *out) {
  constexpr int kRows = V::kRows;
  constexpr int64_t kTileScratch = sizeof(typename V::Weights) * (32 / V::kStep) * P;
  const int64_t tiles = microscale::tiles(a.k), chunk = V::kScratch / kTileScratch;
  const auto rows = reinterpret_cast<const typename V::Operand *const *>(a.rows);
  const auto w = static_cast<typename V::Weights *>(a.scratch);
  for (int64_t tile = 0; tile < tiles; tile += chunk) {
    const int64_t now = tiles - tile < chunk ? tiles - tile : chunk;
    decode<V, D, P, kSpecial>(at, a.weights, tile, now, w);
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

template <class V, class D, int P, bool kSpecial>
void few_rows(const Product &a, const PanelPlace *at, float *out) {
  const auto rows = reinterpret_cast<const typename V::Operand *const *>(a.rows);
  const int64_t tiles = microscale::tiles(a.k);
  switch (a.m) {
    case 1: direct<V, D, 1, P, kSpecial>(at, a.weights, tiles, rows, out, a.stride); break;
    case 2: direct<V, D, 2, P, kSpecial>(at, a.weights, tiles, rows, out, a.stride); break;
    case 3: direct<V, D, (V::kDirect >= 3 ? 3 : 1), P, kSpecial>(at, a.weights, tiles, rows, out, a.stride); break;
    case 4: direct<V, D, (V::kDirect >= 4 ? 4 : 1), P, kSpecial>(at, a.weights, tiles, rows, out, a.stride); break;
  }
}

// P panels from `panel` on.
template <class V, class D, int P, bool kSpecial>
void some_panels(const Product &a, int64_t panel, float *out) {
  PanelPlace at[P];
  for (int i = 0; i < P; ++i) at[i] = panel_place(D::kFormat, a.n, a.k, panel + i);
  if (a.m <= V::kDirect)
    few_rows<V, D, P, kSpecial>(a, at, out);
  else
    many_rows<V, D, P, kSpecial>(a, at, out);
}

template <class V, class D, bool kSpecial>
void product(const Product &a) {
  for (int64_t p = 0; p < a.count;) {
    float *out = a.out + 16 * p;
    const int64_t panel = a.first + p, left = a.count - p;
    if (a.m == 1 && left >= V::kSinglePanels) {
      PanelPlace at[V::kSinglePanels];
      for (int i = 0; i < V::kSinglePanels; ++i) at[i] = panel_place(D::kFormat, a.n, a.k, panel + i);
      direct<V, D, 1, V::kSinglePanels, kSpecial>(at, a.weights, microscale::tiles(a.k),
                                                  reinterpret_cast<const typename V::Operand *const *>(a.rows), out,
                                                  a.stride);
      p += V::kSinglePanels;
    } else if (left >= V::kPanels) {
      some_panels<V, D, V::kPanels, kSpecial>(a, panel, out);
      p += V::kPanels;
    } else {
      some_panels<V, D, 1, kSpecial>(a, panel, out);
      p += 1;
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
