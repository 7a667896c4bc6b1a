// The experts of one layer: first product and activation, then second product and weighted sum, each one parallel loop.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "routes.h"

namespace microscale {
namespace {

constexpr int64_t kMaxTokens = 2048;  // at a time: bounds the intermediate, and a thread's sums
constexpr int64_t kBlock = 32;        // intermediate columns of a unit of the first product: a tile of the second

struct Weights {
  const ms_header *header;
  const float *outer, *bias;  // [E, N] or null

  const uint8_t *expert(int64_t i) const {
    return reinterpret_cast<const uint8_t *>(header) + expert_offset(header, i);
  }
  const float *outer_of(int64_t expert, int64_t column) const {
    return outer ? outer + expert * header->n + column : nullptr;
  }
  const float *bias_of(int64_t expert, int64_t column) const {
    return bias ? bias + expert * header->n + column : nullptr;
  }
};

struct Moe {
  const Kernels *kernels;
  Weights w13, w2;
  const ms_activation *activation;
  const Routes *routes;
  const void *const *x;  // operands of each route
  OperandLayout layout;  // of the second product's operands
  uint8_t *middle;
  const void **middle_rows;
  int64_t m, width, columns;  // tokens; of the intermediate; panels of a unit of the second product
  int dtype;
  uint8_t *y;
  bool weighted;  // the routing weight is on the result
  uint8_t *scratch;
  int64_t scratch_each, sums_bytes, raw_bytes;

  Product product(const Weights &w, int64_t expert, int64_t hit, const void *const *rows, void *decoded) const {
    Product p{};
    p.weights = w.expert(expert);
    p.n = w.header->n;
    p.k = w.header->k;
    p.rows = rows + routes->first(hit);
    p.m = routes->size(hit);
    p.scratch = decoded;
    p.special = (w.header->flags & MS_SPECIAL) != 0;
    p.next = p.weights;
    return p;
  }

  // Weight rows [row, row + count) of w13 times the expert's tokens; returns the sums of `row`.
  float *rows_of_w13(Product &p, int64_t row, int64_t count, float *out) const {
    p.first = row / kPanelColumns;
    p.count = ceil_div(row + count, kPanelColumns) - p.first;
    p.out = out;
    const int64_t after = p.first + p.count;
    p.next = p.weights;
    if (after < panels(p.n)) p.next += panel_place(w13.header->format, p.n, p.k, after).codes;
    kernels->product[w13.header->format](&p);
    return out + row % kPanelColumns;
  }

  // One expert and kBlock columns of its intermediate.
  void first(int64_t unit, uint8_t *own) const {
    const int64_t blocks = ceil_div(width, kBlock);
    const int64_t hit = routes->by_size(unit / blocks), column = unit % blocks * kBlock;
    const int64_t expert = routes->expert(hit), count = std::min(kBlock, width - column);
    Product p = product(w13, expert, hit, x, own);
    // A block of ups may begin inside a panel and then ends in a third one.
    constexpr int64_t kGates = kBlock + kPanelColumns;
    p.stride = 2 * kGates;
    float *raw = reinterpret_cast<float *>(own + kernels->scratch);
    Activate a{};
    a.activation = activation;
    a.stride = p.stride;
    a.m = p.m;
    a.n = count;
    void **out = reinterpret_cast<void **>(own + kernels->scratch + raw_bytes);
    for (int64_t i = 0; i < p.m; ++i)
      out[i] = middle + layout.offset(routes->first(hit), i) + column / 32 * layout.step(p.m, i);
    a.out = out;
    const bool pairs = activation->gated && activation->interleaved;
    const int64_t row = pairs ? 2 * column : column;
    a.gate = rows_of_w13(p, row, pairs ? 2 * count : count, raw);
    a.gate_outer = w13.outer_of(expert, row);
    a.gate_bias = w13.bias_of(expert, row);
    if (activation->gated && !pairs) {
      a.up = rows_of_w13(p, width + column, count, raw + kGates);
      a.up_outer = w13.outer_of(expert, width + column);
      a.up_bias = w13.bias_of(expert, width + column);
    }
    if (count % 32 != 0)  // the second product reads whole tiles
      for (int64_t i = 0; i < p.m; ++i) std::memset(out[i], 0, static_cast<size_t>(32 * element_bytes(layout.operand)));
    kernels->activate(&a);
    if (column == 0)
      for (int64_t i = 0; i < p.m; ++i) middle_rows[routes->first(hit) + i] = out[i];
  }

  // Some output columns of all tokens: every expert's share in ascending order, so that the sum is always the same.
  void second(int64_t unit, uint8_t *own) const {
    const int64_t n = w2.header->n, panel = unit * columns, count = std::min(columns, panels(n) - panel);
    const int64_t column = panel * kPanelColumns, real = std::min(count * kPanelColumns, n - column);
    const int64_t stride = columns * kPanelColumns;
    float *raw = reinterpret_cast<float *>(own + kernels->scratch);
    float *sums = reinterpret_cast<float *>(own + kernels->scratch + raw_bytes);
    std::fill_n(sums, m * stride, 0.0f);
    for (int64_t hit = 0; hit < routes->experts(); ++hit) {
      const int64_t expert = routes->expert(hit), first_route = routes->first(hit);
      Product p = product(w2, expert, hit, middle_rows, own);
      p.first = panel;
      p.count = count;
      p.out = raw;
      p.stride = stride;
      const int64_t after = hit + 1 < routes->experts() ? routes->expert(hit + 1) : routes->expert(0);
      p.next = w2.expert(after) + panel_place(w2.header->format, p.n, p.k, panel).codes;
      kernels->product[w2.header->format](&p);
      const float *outer = w2.outer_of(expert, column), *bias = w2.bias_of(expert, column);
      for (int64_t i = 0; i < p.m; ++i) {
        const float weight = weighted ? routes->weights()[first_route + i] : 1.0f;
        kernels->add(raw + i * stride, outer, bias, weight, real, sums + routes->tokens()[first_route + i] * stride);
      }
    }
    for (int64_t i = 0; i < m; ++i)
      kernels->store(sums + i * stride, nullptr, nullptr, real, dtype, y + (i * n + column) * element_bytes(dtype));
  }

  static void run_first(void *context, int64_t unit, int thread) {
    const Moe &c = *static_cast<const Moe *>(context);
    c.first(unit, c.scratch + thread * c.scratch_each);
  }
  static void run_second(void *context, int64_t unit, int thread) {
    const Moe &c = *static_cast<const Moe *>(context);
    c.second(unit, c.scratch + thread * c.scratch_each);
  }
};

// The experts for at most kMaxTokens tokens.
int some_tokens(Moe &c, const void *x, const int64_t *ids, const float *weights, int64_t t, int threads) {
  const int64_t hidden = c.w13.header->k;
  Routes routes;
  if (const int status = routes.sort(ids, weights, c.m, t, c.w13.header->experts); status != MS_OK) return status;
  c.routes = &routes;

  const int64_t routed = routes.count(), n = c.w2.header->n;
  Operands operands;
  Buffer<const void *> rows(routed), middle_rows(routed);
  c.layout = {c.kernels->operand, c.kernels->tiled != 0, c.width};
  Buffer<uint8_t> middle(c.layout.bytes(routed));
  if (!rows || !middle || !middle_rows) return MS_NO_MEMORY;
  c.x = rows.get();
  c.middle = middle.get();
  c.middle_rows = middle_rows.get();
  if (!c.weighted || c.kernels->tiled) {
    const float *factor = c.weighted ? nullptr : routes.weights();
    if (!operands.prepare(*c.kernels, c.dtype, x, hidden, hidden, routed, routes.firsts(), routes.experts(),
                          routes.tokens(), factor, threads))
      return MS_NO_MEMORY;
    c.x = operands.rows();
  } else {
    const int64_t first[2] = {0, c.m};
    if (!operands.prepare(*c.kernels, c.dtype, x, hidden, hidden, c.m, first, 1, nullptr, nullptr, threads))
      return MS_NO_MEMORY;
    for (int64_t i = 0; i < routed; ++i) rows[i] = operands.rows()[routes.tokens()[i]];
  }

  const int64_t all = panels(n);
  c.columns = all >= 32 * threads ? 4 : all >= 8 * threads ? 2 : 1;
  const int64_t stride = std::max(2 * (kBlock + kPanelColumns), c.columns * kPanelColumns);
  c.raw_bytes = std::max<int64_t>(routes.largest(), 1) * stride * 4;
  const int64_t others = std::max(c.m * stride * 4, routes.largest() * static_cast<int64_t>(sizeof(void *)));
  c.scratch_each = ceil_div(static_cast<int64_t>(c.kernels->scratch) + c.raw_bytes + others, 64) * 64 + 64;
  Buffer<uint8_t> scratch(c.scratch_each * threads);
  if (!scratch) return MS_NO_MEMORY;
  c.scratch = scratch.get();
  parallel(threads, routes.experts() * ceil_div(c.width, kBlock), Moe::run_first, &c);
  parallel(threads, ceil_div(all, c.columns), Moe::run_second, &c);
  return MS_OK;
}

bool agree(const ms_header *w13, const ms_header *w2, const ms_activation *a) {
  const int64_t rows = a->gated ? 2 * w2->k : w2->k;
  return w13->experts == w2->experts && w13->n == rows && w13->experts >= 1 && w13->k >= 1 && w2->k >= 1 &&
         w2->n >= 1 && a->kind >= 0 && a->kind < MS_KINDS;
}

}  // namespace
}  // namespace microscale

extern "C" int ms_moe(int level, const void *w13, const float *outer13, const void *w2, const float *outer2, int dtype,
                      const void *x, int64_t m, const int64_t *ids, const float *weights, int64_t t,
                      const struct ms_activation *activation, const float *b13, const float *b2, int weight_on_input,
                      void *y, int threads) {
  using namespace microscale;
  Moe c{};
  c.w13 = {header_of(w13), outer13, b13};
  c.w2 = {header_of(w2), outer2, b2};
  if (!c.w13.header || !c.w2.header) return MS_BAD_HEADER;
  if (!agree(c.w13.header, c.w2.header, activation) || m < 0 || t < 0 || dtype < 0 || dtype >= MS_DTYPES ||
      threads < 1 || (weight_on_input && t != 1))
    return MS_BAD_ARGUMENT;
  c.kernels = kernels_for(level, dtype, (c.w13.header->flags | c.w2.header->flags) & MS_SPECIAL);
  if (!c.kernels) return MS_BAD_LEVEL;
  c.activation = activation;
  c.width = c.w2.header->k;
  c.dtype = dtype;
  c.weighted = !weight_on_input;
  const int64_t x_bytes = c.w13.header->k * element_bytes(dtype), y_bytes = c.w2.header->n * element_bytes(dtype);
  for (int64_t token = 0; token < m; token += kMaxTokens) {
    c.m = std::min(m - token, kMaxTokens);
    c.y = static_cast<uint8_t *>(y) + token * y_bytes;
    const int status = some_tokens(c, static_cast<const uint8_t *>(x) + token * x_bytes, ids + token * t,
                                   weights + token * t, t, threads);
    if (status != MS_OK) return status;
  }
  return MS_OK;
}
