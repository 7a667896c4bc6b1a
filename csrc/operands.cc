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

  void row(int64_t group, int64_t i) const {
    const int64_t at = first[group] + i, size = first[group + 1] - first[group];
    uint8_t *to = out + layout.offset(first[group], i);
    rows[at] = to;
    kernels->load(dtype, x + (source ? source[at] : at) * x_stride, layout.k, factor ? factor[at] : 1.0f, to,
                  layout.step(size, i));
  }
  static void run(void *context, int64_t unit, int) {
    const Conversion &c = *static_cast<const Conversion *>(context);
    const int64_t from = unit * c.each, to = from + c.each < c.count ? from + c.each : c.count;
    int64_t group = 0;
    while (c.first[group + 1] <= from) ++group;
    for (int64_t i = from; i < to; ++i) {
      while (c.first[group + 1] <= i) ++group;
      c.row(group, i - c.first[group]);
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
  converted_ = Buffer<uint8_t>(layout.bytes(rows));
  if (!converted_) return false;
  Conversion c{&kernels, dtype, bytes, stride, layout, first, source, factor, converted_.get(), rows_.get(), 16, rows};
  parallel(rows * k < (1 << 16) ? 1 : threads, (rows + c.each - 1) / c.each, Conversion::run, &c);
  return true;
}

}  // namespace microscale
