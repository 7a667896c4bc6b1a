// The experts of one layer: first product and activation, then second product and weighted sum, each one parallel loop.
// Where the intermediate's scales need more of a row than a unit has, a third one between them rounds it.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "floats.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "routes.h"
#include "small.h"
#include "stored.h"

namespace microscale {
namespace {

constexpr int64_t kMaxTokens = 2048;  // at a time: bounds the intermediate, and a thread's sums
// Of what a thread uses again and again, if there are many rows: it should stay in its L2 cache.
constexpr int64_t kCacheBytes = 3 << 19;
constexpr int64_t kSumBytes = 1 << 20;  // of a unit's sums of all tokens

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
  ms_activation activation;
  int row_format;  // that whole rows of the intermediate are rounded to, or -1
  const Small *small;
  const Routes *routes;
  const void *const *x;  // operands of each route; null if units gather their own
  const float *x_outer;  // of each token, or null
  const uint8_t *tokens;
  OperandLayout gathered;  // of a unit's operands
  OperandLayout layout;    // of the intermediate
  uint8_t *middle;
  const void **middle_rows;
  const void *const *second_rows;  // operands of each route: the intermediate, or what it is rounded to
  float *second_outer;             // of each route, or null
  void (*activate_rows)(const Activate *);
  int64_t m, width;  // tokens; of the intermediate
  int threads;
  int64_t block;  // intermediate columns that are made at a time
  // Units of the first product, most routes first: `large` experts in `parts` parts each, `whole` experts as they are,
  // and the others in parts.
  int64_t large, whole, parts;
  int64_t units;               // of the second product
  const int64_t *first_panel;  // of each of them, and behind the last
  int64_t together;            // panels of its products
  int dtype;
  uint8_t *y;
  bool weighted;  // the routing weight is on the result
  uint8_t *scratch;
  int64_t scratch_each, raw_bytes, gathered_at;

  Product product(const Weights &w, int64_t expert, int64_t hit, const void *const *rows, void *decoded,
                  int *state) const {
    Product p{};
    p.weights = w.expert(expert);
    p.n = w.header->n;
    p.k = w.header->k;
    p.rows = rows;
    p.m = routes->size(hit);
    p.scratch = decoded;
    p.special = (w.header->flags & MS_SPECIAL) != 0;
    p.state = state;
    p.next = p.weights;
    return p;
  }

  // Weight rows [row, row + count) of w13 times the expert's tokens; returns the sums of `row`. `next` is read after
  // it.
  float *rows_of_w13(Product &p, int64_t hit, int64_t row, int64_t count, float *out, const uint8_t *next) const {
    p.first = row / kPanelColumns;
    p.count = ceil_div(row + count, kPanelColumns) - p.first;
    p.out = out;
    p.next = next;
    kernels->product[w13.header->format](&p);
    if (x_outer)
      scale_rows(out, p.stride, p.m, p.count * kPanelColumns, x_outer, routes->tokens() + routes->first(hit));
    return out + row % kPanelColumns;
  }

  // Where the weights of an expert's row begin.
  const uint8_t *at(const Weights &w, int64_t expert, int64_t row) const {
    const ms_header *h = w.header;
    return w.expert(expert) + panel_place(h->format, h->n, h->k, row / kPanelColumns).codes;
  }
  int64_t first_units() const { return whole + (routes->experts() - whole) * parts; }
  struct Part {
    int64_t hit, from, to;  // blocks [from, to) of that expert's intermediate
  };
  Part part(int64_t unit) const {
    const int64_t all = ceil_div(width, block), after = unit - large * parts;
    if (after >= 0 && after < whole) return {routes->by_size(large + after), 0, all};
    const int64_t split = after < 0 ? unit : unit - whole, i = split % parts;
    return {routes->by_size(split / parts + (after < 0 ? 0 : whole)), all * i / parts, all * (i + 1) / parts};
  }
  const uint8_t *block_of_w13(int64_t expert, int64_t number) const {
    const int64_t column = number * block;
    return at(w13, expert, pairs() ? 2 * column : column);
  }
  // What a thread reads after a unit, if no other takes it: see parallel().
  const uint8_t *after_first(int64_t unit) const {
    const int64_t next = unit + threads;
    if (next >= first_units()) return after_second(unit % threads - threads);
    const Part p = part(next);
    return block_of_w13(routes->expert(p.hit), p.from);
  }
  const uint8_t *after_second(int64_t unit) const {
    const int64_t next = unit + threads;
    return at(w2, routes->expert(0), next < units ? first_panel[next] * kPanelColumns : 0);
  }

  bool pairs() const { return activation.gated && activation.interleaved; }
  int64_t raw_stride() const { return 2 * (block + kPanelColumns); }  // a block of ups may begin inside a panel

  // One expert and some columns of its intermediate.
  void first(int64_t unit, uint8_t *own) const {
    const auto [hit, from, to] = part(unit);
    const int64_t expert = routes->expert(hit);
    const void *rows[1] = {own + gathered_at};
    int state = 0;
    if (!x) gather(hit, own + gathered_at);
    for (int64_t number = from; number < to; ++number) {
      const uint8_t *next = number + 1 < to ? block_of_w13(expert, number + 1) : after_first(unit);
      some_columns(hit, x ? x + routes->first(hit) : rows, number * block, own, &state, next);
    }
    if (kernels->end) kernels->end();
  }

  // An expert's tokens as operands.
  void gather(int64_t hit, uint8_t *to) const {
    const int64_t size = routes->size(hit), bytes = element_bytes(dtype);
    const Source source{dtype, tokens, gathered.k * bytes, routes->tokens() + routes->first(hit), nullptr};
    for (int64_t tile = 0; tile < size; tile += 16)
      source.convert(*kernels, gathered, 0, 0, size, tile, std::min(tile + 16, size), to);
  }

  void some_columns(int64_t hit, const void *const *rows, int64_t column, uint8_t *own, int *state,
                    const uint8_t *after) const {
    const int64_t expert = routes->expert(hit), count = std::min(block, width - column);
    Product p = product(w13, expert, hit, rows, own, state);
    p.stride = raw_stride();
    float *raw = reinterpret_cast<float *>(own + kernels->scratch);
    const int64_t row = pairs() ? 2 * column : column;
    const bool apart = activation.gated && !pairs();
    const float *up = nullptr, *gate = rows_of_w13(p, hit, row, pairs() ? 2 * count : count, raw,
                                                   apart ? at(w13, expert, width + column) : after);
    if (apart) up = rows_of_w13(p, hit, width + column, count, raw + block + kPanelColumns, after);
    void **out = reinterpret_cast<void **>(own + kernels->scratch + raw_bytes);
    const int64_t step = layout.step(p.m), start = column / kTileK * step;
    layout.each_row(hit, routes->first(hit), p.m, [&](int64_t i, int64_t offset) { out[i] = middle + offset + start; });
    if (column == 0) std::copy_n(out, p.m, middle_rows + routes->first(hit));
    // Tiles of the second product one after the other.
    for (int64_t part = 0; part < count; part += kTileK) {
      activate(p, expert, column + part, std::min(kTileK, count - part), gate + (pairs() ? 2 * part : part),
               up ? up + part : nullptr, out);
      for (int64_t i = 0; i < p.m; ++i) out[i] = static_cast<uint8_t *>(out[i]) + step;
    }
  }

  // Sums of gates and ups to `count` columns of the intermediate.
  void activate(const Product &p, int64_t expert, int64_t column, int64_t count, const float *gate, const float *up,
                void *const *out) const {
    const int64_t row = pairs() ? 2 * column : column;
    if (count < kTileK)
      for (int64_t i = 0; i < p.m; ++i)
        std::memset(out[i], 0, static_cast<size_t>(kTileK * element_bytes(layout.operand)));
    Activate a{};
    a.activation = &activation;
    a.gate = gate;
    a.gate_outer = w13.outer_of(expert, row);
    a.gate_bias = w13.bias_of(expert, row);
    a.up = up;
    if (up) a.up_outer = w13.outer_of(expert, width + column), a.up_bias = w13.bias_of(expert, width + column);
    a.stride = p.stride;
    a.m = p.m;
    a.n = count;
    a.out = out;
    activate_rows(&a);
  }

  // Some output columns of all tokens: every expert's share in ascending order, so that the sum is always the same.
  void second(int64_t unit, uint8_t *own) const {
    const int64_t n = w2.header->n, panel = first_panel[unit], end = first_panel[unit + 1];
    const int64_t column = panel * kPanelColumns, real = std::min(end * kPanelColumns, n) - column;
    const int64_t stride = (end - panel) * kPanelColumns;
    float *sums = reinterpret_cast<float *>(own + kernels->scratch + raw_bytes);
    std::fill_n(sums, m * stride, 0.0f);
    int state = 0;
    for (int64_t hit = 0; hit < routes->experts(); ++hit)
      for (int64_t p = panel; p < end; p += together) add(unit, hit, p, std::min(together, end - p), own, &state, sums);
    if (kernels->end) kernels->end();
    for (int64_t i = 0; i < m; ++i)
      kernels->store(sums + i * stride, nullptr, nullptr, real, dtype, y + (i * n + column) * element_bytes(dtype));
  }

  // One expert's share of `count` panels of a unit to all its tokens' sums.
  void add(int64_t unit, int64_t hit, int64_t panel, int64_t count, uint8_t *own, int *state, float *sums) const {
    const int64_t expert = routes->expert(hit), first_route = routes->first(hit);
    const int64_t from = first_panel[unit], end = first_panel[unit + 1];
    const int64_t stride = together * kPanelColumns, sum_stride = (end - from) * kPanelColumns;
    float *raw = reinterpret_cast<float *>(own + kernels->scratch);
    Product p = product(w2, expert, hit, second_rows + first_route, own, state);
    p.first = panel;
    p.count = count;
    p.out = raw;
    p.stride = stride;
    const int64_t column = p.first * kPanelColumns, real = std::min(count * kPanelColumns, p.n - column);
    p.next = panel + count < end           ? at(w2, expert, column + count * kPanelColumns)
             : hit + 1 < routes->experts() ? at(w2, routes->expert(hit + 1), from * kPanelColumns)
                                           : after_second(unit);
    kernels->product[w2.header->format](&p);
    if (second_outer) scale_rows(raw, stride, p.m, real, second_outer + first_route, nullptr);
    const float *outer = w2.outer_of(expert, column), *bias = w2.bias_of(expert, column);
    sums += column - from * kPanelColumns;
    for (int64_t i = 0; i < p.m; ++i) {
      const float weight = weighted ? routes->weights()[first_route + i] : 1.0f;
      kernels->add(raw + i * stride, outer, bias, weight, real, sums + routes->tokens()[first_route + i] * sum_stride);
    }
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

// Shares `steps` steps out into units, `threads` of one size at a time: of at most `most` steps at first, since a unit
// of the second product reads the intermediate of all tokens, and of few at the end, where threads wait for each other.
// Returns how many there are; from[i] is the first step of unit i, from[units] is `steps`.
int64_t share(int64_t steps, int64_t threads, int64_t most, int64_t *from) {
  int64_t units = 0;
  for (int64_t step = 0, size = 0; step < steps; step += size, ++units) {
    const int64_t left = steps - step;
    if (units % threads == 0) size = std::min(std::max<int64_t>((left + threads) / (2 * threads), 1), most);
    from[units] = step;
  }
  from[units] = steps;
  return units;
}

// The experts for at most kMaxTokens tokens.
int some_tokens(Moe &c, const void *x, const int64_t *ids, const float *weights, int64_t t, int threads) {
  const int64_t hidden = c.w13.header->k;
  Routes routes;
  if (const int status = routes.sort(ids, weights, c.m, t, c.w13.header->experts); status != MS_OK) return status;
  c.routes = &routes;

  const int64_t routed = routes.count(), n = c.w2.header->n;
  Operands operands, rounded;
  Buffer<const void *> rows(routed), middle_rows(routed);
  const OperandLayout second{c.kernels->operand, c.kernels->tiled != 0, c.width};
  c.layout = c.row_format < 0 ? second : OperandLayout{MS_FP32, false, c.width};
  Buffer<uint8_t> middle(c.layout.bytes(routed, routes.experts()));
  if (!rows || !middle || !middle_rows) return MS_NO_MEMORY;
  c.middle = middle.get();
  c.second_rows = c.middle_rows = middle_rows.get();
  c.tokens = static_cast<const uint8_t *>(x);
  c.gathered = {c.kernels->operand, c.kernels->tiled != 0, hidden};
  // Many rows of an expert are put together by whoever needs them, while they fit into a thread's cache.
  const int64_t most = whole_rows(std::max<int64_t>(routes.largest(), 1));
  const bool gather =
      c.gathered.tiled && c.weighted && routes.largest() > 16 && c.gathered.bytes(most, 0) <= kCacheBytes;
  if (gather) {
    c.x = nullptr;
  } else if (!c.weighted || c.kernels->tiled) {
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
    c.x = rows.get();
  }

  // Whole groups of panels where that leaves enough units. Interleaved gates and ups share a group.
  const int64_t all = panels(n), whole = c.pairs() ? 32 : 64;
  c.block = routes.experts() * ceil_div(c.width, whole) >= 4 * threads ? whole : 32;
  // Units that gather have much to do with it, so they are whole experts, but for those that would keep one thread busy
  // for long, and the last few.
  const int64_t blocks = ceil_div(c.width, c.block), experts = routes.experts();
  c.large = c.whole = 0;
  c.parts = blocks;
  if (gather) {
    while (c.large < experts && 4 * threads * routes.size(routes.by_size(c.large)) > routed) ++c.large;
    c.whole = std::max<int64_t>(experts - c.large - 4 * threads, 0);
    c.parts = std::min(blocks, ceil_div(16 * threads, experts - c.whole));
  }
  const int64_t step = all >= 32 * threads ? 4 : all >= 8 * threads ? 2 : 1, steps = ceil_div(all, step);
  const int64_t step_bytes = step * kPanelColumns * c.m * 4;
  // With many rows they, not weights, are most of what is read: more panels of an expert at a time.
  const bool many = routes.largest() > 16;
  c.together = step;
  if (many)
    while (8 * c.together * threads <= all && 2 * c.together / step * step_bytes + second.bytes(most, 0) <= kCacheBytes)
      c.together *= 2;
  Buffer<int64_t> first_panel(steps + 1);
  if (!first_panel) return MS_NO_MEMORY;
  c.units = share(steps, threads, many ? std::max<int64_t>(kSumBytes / step_bytes, 1) : 1, first_panel.get());
  int64_t largest = 0;  // unit, in steps
  for (int64_t i = 0; i < c.units; ++i) largest = std::max(largest, first_panel[i + 1] - first_panel[i]);
  for (int64_t i = 0; i <= c.units; ++i) first_panel[i] = std::min(first_panel[i] * step, all);
  c.first_panel = first_panel.get();
  c.raw_bytes = most * std::max(c.raw_stride(), c.together * kPanelColumns) * 4;
  const int64_t others = std::max(largest * step_bytes, most * static_cast<int64_t>(sizeof(void *)));
  c.gathered_at = ceil_div(static_cast<int64_t>(c.kernels->scratch) + c.raw_bytes + others, 64) * 64;
  c.scratch_each = c.gathered_at + (gather ? c.gathered.bytes(most, 0) : 0) + kApart;
  Buffer<uint8_t> scratch(c.scratch_each * threads);
  if (!scratch) return MS_NO_MEMORY;
  c.scratch = scratch.get();
  parallel(threads, c.first_units(), Moe::run_first, &c);
  Buffer<float> outer(routed);
  if (c.row_format >= 0) {
    const int64_t step = c.layout.row_bytes(), apart = step / element_bytes(second.operand);
    if (!outer) return MS_NO_MEMORY;
    c.second_outer = second.operand == MS_BF16 ? outer.get() : nullptr;
    store_rows(*c.small, c.row_format, MS_FP32, c.middle, step, routed, c.width, second.operand, c.middle, step,
               c.second_outer, threads);
    if (!rounded.prepare(*c.kernels, second.operand, c.middle, apart, c.width, routed, routes.firsts(),
                         routes.experts(), nullptr, nullptr, threads))
      return MS_NO_MEMORY;
    c.second_rows = rounded.rows();
  }
  parallel(threads, c.units, Moe::run_second, &c);
  return MS_OK;
}

bool agree(const ms_header *w13, const ms_header *w2, int dtype, const ms_activation *a) {
  const int64_t rows = a->gated ? 2 * w2->k : w2->k;
  return w13->experts == w2->experts && w13->n == rows && w13->experts >= 1 && w13->k >= 1 && w2->k >= 1 &&
         w2->n >= 1 && a->kind >= 0 && a->kind < MS_KINDS && a->stored >= 0 && a->stored <= MS_FORMATS &&
         (a->stored != MS_FP8_BLOCK128 + 1 || dtype == MS_FP32);
}

}  // namespace
}  // namespace microscale

extern "C" int ms_moe(int level, const void *w13, const float *outer13, const void *w2, const float *outer2, int dtype,
                      const void *x, const float *x_outer, int64_t m, const int64_t *ids, const float *weights,
                      int64_t t, const struct ms_activation *activation, const float *b13, const float *b2,
                      int weight_on_input, void *y, int threads) {
  using namespace microscale;
  const StandardFloats floats;
  Moe c{};
  c.w13 = {header_of(w13), outer13, b13};
  c.w2 = {header_of(w2), outer2, b2};
  if (!c.w13.header || !c.w2.header) return MS_BAD_HEADER;
  if (!agree(c.w13.header, c.w2.header, dtype, activation) || m < 0 || t < 0 || dtype < 0 || dtype >= MS_DTYPES ||
      threads < 1 || (weight_on_input && t != 1))
    return MS_BAD_ARGUMENT;
  c.kernels = kernels_for(level, dtype, (c.w13.header->flags | c.w2.header->flags) & MS_SPECIAL);
  if (!c.kernels) return MS_BAD_LEVEL;
  c.activation = *activation;
  c.row_format = -1;
  if (activation->stored > MS_MXINT8 + 1) c.row_format = activation->stored - 1, c.activation.stored = 0;
  c.small = small_for(level);
  c.activate_rows = (c.row_format < 0 ? c.kernels : kernels_for(level, MS_FP32, false))->activate;
  c.width = c.w2.header->k;
  c.threads = threads;
  c.dtype = dtype;
  c.weighted = !weight_on_input;
  const int64_t x_bytes = c.w13.header->k * element_bytes(dtype), y_bytes = c.w2.header->n * element_bytes(dtype);
  for (int64_t token = 0; token < m; token += kMaxTokens) {
    c.m = std::min(m - token, kMaxTokens);
    c.x_outer = x_outer ? x_outer + token : nullptr;
    c.y = static_cast<uint8_t *>(y) + token * y_bytes;
    const int status = some_tokens(c, static_cast<const uint8_t *>(x) + token * x_bytes, ids + token * t,
                                   weights + token * t, t, threads);
    if (status != MS_OK) return status;
  }
  return MS_OK;
}
