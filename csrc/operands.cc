#include "operands.h"

#include "parallel.h"

namespace microscale {
namespace {

struct Conversion {
  const Kernels *kernels;
  int dtype;
  const uint8_t *x;
  int64_t x_stride;  // bytes
  OperandLayout layout;
  const int64_t *first, *source;
  const float *factor;
  uint8_t *out;
  const void **rows;
  int64_t each, count;  // rows: of a unit, and in all

  // Columns [column, column + n) of some rows of one group. Few columns at a time, so that what tiled rows share stays
  // in the L1 cache until it is whole.
  void columns(int64_t group, int64_t from, int64_t to, int64_t column, int64_t n) const {
    const int64_t start = first[group], step = layout.step(first[group + 1] - start);
    for (int64_t i = from; i < to; ++i) {
      const uint8_t *row = x + (source ? source[i] : i) * x_stride;
      uint8_t *const operands = out + layout.offset(group, start, i - start);
      if (column == 0) rows[i] = operands;
      kernels->load(dtype, row + column * element_bytes(dtype), n, factor ? factor[i] : 1.0f,
                    operands + column / 32 * step, step);
    }
  }
  static void run(void *context, int64_t unit, int) {
    constexpr int64_t kColumns = 512;
    const Conversion &c = *static_cast<const Conversion *>(context);
    const int64_t end = unit * c.each + c.each < c.count ? unit * c.each + c.each : c.count;
    int64_t group = 0;
    for (int64_t from = unit * c.each, to; from < end; from = to) {
      while (c.first[group + 1] <= from) ++group;
      to = c.first[group + 1] < end ? c.first[group + 1] : end;
      const int64_t k = c.layout.k;
      for (int64_t column = 0; column < k; column += kColumns)
        c.columns(group, from, to, column, k - column < kColumns ? k - column : kColumns);
    }
  }
};

}  // namespace

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
  Conversion c{&kernels, dtype, bytes, stride, layout, first, source, factor, converted_.get(), rows_.get(), 16, rows};
  parallel(rows * k < (1 << 16) ? 1 : threads, (rows + c.each - 1) / c.each, Conversion::run, &c);
  return true;
}

}  // namespace microscale
