// The product of rows and packed weights, one algorithm for every level. `V` is a level's vectors, `D` a format's
// decoder for them; both are defined by the unit that includes this.
//
// Every block of weights is summed on its own, in order of k, and its sum is then multiplied by the block's scale and
// added to the total. So a decoder need not know scales, any scale is exact, and whether a tile was decoded for one row
// or for a thousand, a row's result is the same to the bit.
#pragma once
#include "table.h"
#include "../layout.h"

namespace microscale {
namespace {

// Rows that share a decoded vector while it is in a register; more rows than kDirect go through decoded tiles in L1.
template <class V, class D, int R, bool kSpecial>
void direct(const uint8_t *codes, const uint8_t *scales, int64_t tiles, const typename V::Operand *const *rows,
            float *out, int64_t stride) {
  typename V::Total total[R];
  for (int r = 0; r < R; ++r) total[r] = V::no_total();
  const typename V::Operand *x[R];
  for (int r = 0; r < R; ++r) x[r] = rows[r];
  const D decoder{};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    V::prefetch(codes + V::kAhead, D::kTileBytes);
    for (int block = 0; block < D::kBlocks; ++block) {
      typename V::Sum sum[R];
      for (int r = 0; r < R; ++r) sum[r] = V::no_sum();
      decoder.template steps<kSpecial>(codes, block, [&](int step, const typename V::Weights &w) {
        for (int r = 0; r < R; ++r) V::multiply(sum[r], w, x[r] + V::kStep * step);
      });
      const auto scale = D::template scale<kSpecial>(scales, tile, block);
      for (int r = 0; r < R; ++r) V::template add_block<D, kSpecial>(total[r], sum[r], scale);
    }
    codes += D::kTileBytes;
    for (int r = 0; r < R; ++r) x[r] += 32;
  }
  for (int r = 0; r < R; ++r) V::store(out + r * stride, total[r]);
}

// R rows times P panels of decoded tiles; the totals so far are in `out`.
template <class V, class D, int R, int P, bool kSpecial>
void decoded(const typename V::Weights *w, const uint8_t *const *scales, int64_t tile, int64_t tiles,
             const typename V::Operand *const *rows, float *out, int64_t stride) {
  constexpr int kSteps = 32 / V::kStep / D::kBlocks;
  typename V::Total total[R][P];
  const typename V::Operand *x[R];
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
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) V::store(out + r * stride + 16 * p, total[r][p]);
}

template <class V, class D, int P, bool kSpecial>
void decode(const uint8_t *const *panels, int64_t tile, int64_t tiles, typename V::Weights *w) {
  constexpr int kSteps = 32 / V::kStep / D::kBlocks;
  const D decoder{};
  for (int64_t t = tile; t < tile + tiles; ++t)
    for (int block = 0; block < D::kBlocks; ++block, w += P * kSteps)
      for (int p = 0; p < P; ++p)
        decoder.template steps<kSpecial>(panels[p] + t * D::kTileBytes, block,
                                         [&](int step, const typename V::Weights &v) {
                                           w[(step % kSteps) * P + p] = v;
                                         });
}

template <class V, class D, int P, bool kSpecial>
void many_rows(const Product &a, const uint8_t *const *panels, const uint8_t *const *scales, float *out) {
  constexpr int kRows = V::kRows;
  constexpr int64_t kTileScratch = sizeof(typename V::Weights) * (32 / V::kStep) * P;
  const int64_t tiles = microscale::tiles(a.k), chunk = V::kScratch / kTileScratch;
  const auto rows = reinterpret_cast<const typename V::Operand *const *>(a.rows);
  const auto w = static_cast<typename V::Weights *>(a.scratch);
  for (int64_t tile = 0; tile < tiles; tile += chunk) {
    const int64_t now = tiles - tile < chunk ? tiles - tile : chunk;
    decode<V, D, P, kSpecial>(panels, tile, now, w);
    // As few groups as possible, all of about the same size.
    const int64_t groups = (a.m + kRows - 1) / kRows;
    for (int64_t g = 0, row = 0; g < groups; ++g) {
      const int64_t count = (a.m - row) / (groups - g);
      const auto x = rows + row;
      float *o = out + row * a.stride;
      switch (count) {
        case 1: decoded<V, D, 1, P, kSpecial>(w, scales, tile, now, x, o, a.stride); break;
        case 2: decoded<V, D, 2, P, kSpecial>(w, scales, tile, now, x, o, a.stride); break;
        case 3: decoded<V, D, (kRows >= 3 ? 3 : 1), P, kSpecial>(w, scales, tile, now, x, o, a.stride); break;
        case 4: decoded<V, D, (kRows >= 4 ? 4 : 1), P, kSpecial>(w, scales, tile, now, x, o, a.stride); break;
        case 5: decoded<V, D, (kRows >= 5 ? 5 : 1), P, kSpecial>(w, scales, tile, now, x, o, a.stride); break;
        case 6: decoded<V, D, (kRows >= 6 ? 6 : 1), P, kSpecial>(w, scales, tile, now, x, o, a.stride); break;
      }
      row += count;
    }
  }
}

template <class V, class D, bool kSpecial>
void few_rows(const Product &a, const uint8_t *panel, const uint8_t *scales, float *out) {
  const auto rows = reinterpret_cast<const typename V::Operand *const *>(a.rows);
  const int64_t tiles = microscale::tiles(a.k);
  switch (a.m) {
    case 1: direct<V, D, 1, kSpecial>(panel, scales, tiles, rows, out, a.stride); break;
    case 2: direct<V, D, 2, kSpecial>(panel, scales, tiles, rows, out, a.stride); break;
    case 3: direct<V, D, (V::kDirect >= 3 ? 3 : 1), kSpecial>(panel, scales, tiles, rows, out, a.stride); break;
    case 4: direct<V, D, (V::kDirect >= 4 ? 4 : 1), kSpecial>(panel, scales, tiles, rows, out, a.stride); break;
  }
}

template <class V, class D, bool kSpecial>
void product(const Product &a) {
  const int64_t size = panel_bytes(D::kFormat, a.k), where = scales_offset(D::kFormat, a.k);
  const uint8_t *panel = a.panels + a.first * size;
  for (int64_t p = 0; p < a.count;) {
    float *out = a.out + 16 * p;
    const uint8_t *panels[2] = {panel + p * size, panel + (p + 1) * size};
    const uint8_t *scales[2] = {panels[0] + where, panels[1] + where};
    if (a.m <= V::kDirect) {
      few_rows<V, D, kSpecial>(a, panels[0], scales[0], out);
      p += 1;
    } else if (p + 1 < a.count && V::kPanels == 2) {
      many_rows<V, D, V::kPanels, kSpecial>(a, panels, scales, out);
      p += 2;
    } else {
      many_rows<V, D, 1, kSpecial>(a, panels, scales, out);
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
