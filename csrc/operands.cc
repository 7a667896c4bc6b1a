#include "operands.h"

#include "parallel.h"

namespace microscale {
namespace {

struct Conversion {
  const Kernels *kernels;
  Source source;
  OperandLayout layout;
  const int64_t *first;
  uint8_t *out;
  const void **rows;
  int64_t each, count;  // rows: of a unit, and in all

  static void run(void *context, int64_t unit, int) {
    const Conversion &c = *static_cast<const Conversion *>(context);
    const int64_t end = unit * c.each + c.each < c.count ? unit * c.each + c.each : c.count;
    int64_t group = 0;
    for (int64_t from = unit * c.each, to; from < end; from = to) {
      while (c.first[group + 1] <= from) ++group;
      to = c.first[group + 1] < end ? c.first[group + 1] : end;
      const int64_t start = c.first[group];
      c.source.convert(*c.kernels, c.layout, group, start, c.first[group + 1] - start, from, to, c.out);
      const int64_t size = c.first[group + 1] - start;
      for (int64_t i = from; i < to; ++i) c.rows[i] = c.out + c.layout.offset(group, start, size, i - start);
    }
  }
};

}  // namespace

void scale_rows(float *sums, int64_t stride, int64_t m, int64_t n, const float *factor, const int64_t *row) {
  for (int64_t i = 0; i < m; ++i, sums += stride) {
    const float by = factor[row ? row[i] : i];
    for (int64_t j = 0; j < n; ++j) sums[j] *= by;
  }
}

void Source::convert(const Kernels &kernels, const OperandLayout &layout, int64_t group, int64_t first, int64_t size,
                     int64_t from, int64_t to, uint8_t *out) const {
  constexpr int64_t kColumns = 512;  // at a time, so that what tiled rows share stays in the L1 cache until it is whole
  const int64_t step = layout.step(size);
  for (int64_t column = 0; column < layout.k; column += kColumns)
    for (int64_t i = from; i < to; ++i)
      kernels.load(dtype, x + (row ? row[i] : i) * stride + column * element_bytes(dtype),
                   layout.k - column < kColumns ? layout.k - column : kColumns, factor ? factor[i] : 1.0f,
                   out + layout.offset(group, first, size, i - first) + column / 32 * step, step);
}

bool Operands::prepare(const Kernels &kernels, int dtype, const void *x, int64_t x_stride, int64_t k, int64_t rows,
                       const int64_t *first, int64_t groups, const int64_t *source, const float *factor, int threads) {
  const auto bytes = static_cast<const uint8_t *>(x);
  const int64_t stride = x_stride * element_bytes(dtype);
  rows_ = Buffer<const void *>(rows);
  if (!rows_) return false;
  // A group of one row is the same tiled or not.
  if (dtype == kernels.operand && k % 32 == 0 && factor == nullptr && (!kernels.tiled || groups == rows)) {
    for (int64_t i = 0; i < rows; ++i) rows_[i] = bytes + (source ? source[i] : i) * stride;
    return true;
  }
  const OperandLayout layout{kernels.operand, kernels.tiled != 0, k};
  converted_ = Buffer<uint8_t>(layout.bytes(rows, groups));
  if (!converted_) return false;
  const Source from{dtype, bytes, stride, source, factor};
  Conversion c{&kernels, from, layout, first, converted_.get(), rows_.get(), 16, rows};
  parallel(rows * k < (1 << 16) ? 1 : threads, (rows + c.each - 1) / c.each, Conversion::run, &c);
  return true;
}

}  // namespace microscale
