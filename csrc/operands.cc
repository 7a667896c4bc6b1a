#include "operands.h"

#include "parallel.h"

namespace microscale {
namespace {

struct Conversion {
  const Kernels *kernels;
  int dtype;
  const uint8_t *x;
  int64_t stride, k, m;  // stride in bytes
  const int64_t *source;
  const float *factor;
  uint8_t *out;
  int64_t spacing;
  static constexpr int64_t kRows = 8;  // a unit

  static void run(void *context, int64_t unit, int) {
    const Conversion &c = *static_cast<const Conversion *>(context);
    const int64_t last = (unit + 1) * kRows < c.m ? (unit + 1) * kRows : c.m;
    for (int64_t i = unit * kRows; i < last; ++i)
      c.kernels->load(c.dtype, c.x + (c.source ? c.source[i] : i) * c.stride, c.k, c.factor ? c.factor[i] : 1.0f,
                      c.out + i * c.spacing, padded_k(c.k));
  }
};

}  // namespace

bool Operands::prepare(const Kernels &kernels, int dtype, const void *x, int64_t x_stride, int64_t k, int64_t m,
                       const int64_t *source, const float *factor, int threads) {
  const auto bytes = static_cast<const uint8_t *>(x);
  const int64_t stride = x_stride * element_bytes(dtype);
  rows_ = Buffer<const void *>(m);
  if (!rows_) return false;
  const bool equal = source == nullptr || m == 1;
  if (dtype == kernels.operand && k % 32 == 0 && factor == nullptr && (equal || !kernels.spaced)) {
    for (int64_t i = 0; i < m; ++i) rows_[i] = bytes + (source ? source[i] : i) * stride;
    spacing_ = equal ? stride : 0;
    return true;
  }
  spacing_ = operand_spacing(kernels.operand, k);
  converted_ = Buffer<uint8_t>(m * spacing_);
  if (!converted_) return false;
  Conversion c{&kernels, dtype, bytes, stride, k, m, source, factor, converted_.get(), spacing_};
  const int64_t units = (m + Conversion::kRows - 1) / Conversion::kRows;
  parallel(m * k < (1 << 16) ? 1 : threads, units, Conversion::run, &c);
  for (int64_t i = 0; i < m; ++i) rows_[i] = converted_.get() + i * spacing_;
  return true;
}

}  // namespace microscale
