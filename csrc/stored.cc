#include "stored.h"

#include "floats.h"
#include "layout.h"
#include "microscale.h"
#include "operands.h"
#include "parallel.h"
#include "small.h"

namespace microscale {
namespace {

constexpr int64_t kPiece = 16 << 10;  // numbers of a unit, at least: a thread takes some microseconds to wake

struct Rows {
  const Small &small;
  int format, dtype, to;
  const uint8_t *x;
  uint8_t *y;
  float *outer;
  int64_t x_step, y_step, m, k, each;

  static void run(void *context, int64_t unit, int) {
    const StandardFloats floats;
    const Rows &r = *static_cast<const Rows *>(context);
    for (int64_t row = unit * r.each; row < r.m && row < (unit + 1) * r.each; ++row)
      r.small.stored(r.format, r.dtype, r.x + row * r.x_step, r.k, r.to, r.y + row * r.y_step,
                     r.outer ? r.outer + row : nullptr);
  }
};

}  // namespace

void store_rows(const Small &small, int format, int dtype, const void *x, int64_t x_step, int64_t m, int64_t k, int to,
                void *y, int64_t y_step, float *outer, int threads) {
  Rows r{small, format, dtype, to, static_cast<const uint8_t *>(x), static_cast<uint8_t *>(y), outer};
  r.x_step = x_step, r.y_step = y_step, r.m = m, r.k = k, r.each = ceil_div(kPiece, k);
  parallel(threads, ceil_div(m, r.each), Rows::run, &r);
}

}  // namespace microscale

extern "C" int ms_stored(int level, int format, int dtype, const void *x, int64_t x_stride, int64_t m, int64_t k,
                         int to, void *y, float *outer, int threads) {
  using namespace microscale;
  const bool known = format >= 0 && (format <= MS_MXINT8 || (format < MS_FORMATS && (to == MS_FP32 || outer)));
  if (!known || (outer && format != MS_NVFP4) || dtype < 0 || dtype >= MS_DTYPES || to < 0 || to >= MS_DTYPES ||
      m < 0 || k < 1 || threads < 1)
    return MS_BAD_ARGUMENT;
  const Small *small = small_for(level);
  if (!small) return MS_BAD_LEVEL;
  store_rows(*small, format, dtype, x, x_stride * element_bytes(dtype), m, k, to, y, k * element_bytes(to), outer,
             threads);
  return MS_OK;
}
