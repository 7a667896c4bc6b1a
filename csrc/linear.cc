// One product: y = x w^T * x_outer * outer + bias.
#include <algorithm>

#include "dispatch.h"
#include "floats.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"

namespace microscale {
namespace {

constexpr int64_t kMaxRows = 2048;  // whose sums one thread holds at a time

struct Linear {
  const Kernels *kernels;
  const ms_header *w;
  const float *outer, *x_outer, *bias;
  int dtype;
  const void *const *rows;
  int64_t m;
  uint8_t *y;
  int64_t columns;  // panels of a unit
  int threads;
  float *sums;
  uint8_t *scratch;
  int64_t sums_each, scratch_each;

  static void run(void *context, int64_t unit, int thread) {
    const Linear &c = *static_cast<const Linear *>(context);
    const int64_t n = c.w->n, first = unit * c.columns, count = std::min(c.columns, panels(n) - first);
    float *sums = c.sums + thread * c.sums_each;
    const int64_t stride = c.columns * kPanelColumns;
    int state = 0;
    Product p{};
    p.state = &state;
    p.weights = reinterpret_cast<const uint8_t *>(c.w) + expert_offset(c.w, 0);
    p.n = n;
    p.k = c.w->k;
    p.first = first;
    p.count = count;
    p.rows = c.rows;
    p.m = c.m;
    p.out = sums;
    p.stride = stride;
    p.scratch = c.scratch + thread * c.scratch_each;
    p.special = (c.w->flags & MS_SPECIAL) != 0;
    p.next = p.weights;
    // What this thread reads next, if no other takes it: see parallel().
    const int64_t after = first + c.threads * c.columns;
    if (after < panels(n)) p.next += panel_place(c.w->format, n, c.w->k, after).codes;
    c.kernels->product[c.w->format](&p);
    if (c.kernels->end) c.kernels->end();
    const int64_t column = first * kPanelColumns, width = std::min(count * kPanelColumns, n - column);
    if (c.x_outer) scale_rows(sums, stride, c.m, width, c.x_outer, nullptr);
    const float *outer = c.outer ? c.outer + column : nullptr, *bias = c.bias ? c.bias + column : nullptr;
    for (int64_t i = 0; i < c.m; ++i)
      c.kernels->store(sums + i * stride, outer, bias, width, c.dtype, c.y + (i * n + column) * element_bytes(c.dtype));
  }
};

}  // namespace
}  // namespace microscale

extern "C" int ms_linear(int level, const void *weights, const float *outer, int dtype, const void *x, int64_t x_stride,
                         const float *x_outer, int64_t m, const float *bias, void *y, int threads) {
  using namespace microscale;
  const StandardFloats floats;
  const ms_header *w = header_of(weights);
  if (!w) return MS_BAD_HEADER;
  if (w->experts != 1 || w->n < 1 || w->k < 1 || m < 0 || dtype < 0 || dtype >= MS_DTYPES || threads < 1)
    return MS_BAD_ARGUMENT;
  const Kernels *kernels = kernels_for(level, dtype, w->flags & MS_SPECIAL);
  if (!kernels) return MS_BAD_LEVEL;
  if (m == 0) return MS_OK;

  const int64_t all = panels(w->n);
  // Waking a thread costs microseconds, in which one core reads some 100 KB.
  if (w->bytes * std::min<int64_t>(m, 16) < (1 << 17)) threads = 1;
  Linear c{};
  c.kernels = kernels;
  c.w = w;
  c.outer = outer;
  c.bias = bias;
  c.dtype = dtype;
  c.threads = threads;
  c.columns = all >= 32 * threads ? 4 : all >= 8 * threads ? 2 : 1;
  c.sums_each = whole_rows(std::min(m, kMaxRows)) * c.columns * kPanelColumns + kApart / 4;
  c.scratch_each = static_cast<int64_t>(kernels->scratch) + kApart;
  Buffer<float> sums(c.sums_each * threads);
  Buffer<uint8_t> scratch(c.scratch_each * threads);
  if (!sums || !scratch) return MS_NO_MEMORY;
  c.sums = sums.get();
  c.scratch = scratch.get();
  for (int64_t row = 0; row < m; row += kMaxRows) {
    c.m = std::min(m - row, kMaxRows);
    const int64_t first[2] = {0, c.m};
    const uint8_t *from = static_cast<const uint8_t *>(x) + row * x_stride * element_bytes(dtype);
    Operands operands;
    if (!operands.prepare(*kernels, dtype, from, x_stride, w->k, c.m, first, 1, nullptr, nullptr, threads))
      return MS_NO_MEMORY;
    c.rows = operands.rows();
    c.x_outer = x_outer ? x_outer + row : nullptr;
    c.y = static_cast<uint8_t *>(y) + row * w->n * element_bytes(dtype);
    parallel(threads, ceil_div(all, c.columns), Linear::run, &c);
  }
  return MS_OK;
}
