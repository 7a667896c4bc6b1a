// One product with weights that are not packed: y = x w^T + bias.
#include "dense.h"

#include <algorithm>

#include "buffer.h"
#include "floats.h"
#include "kernels/dense_table.h"
#include "operands.h"
#include "parallel.h"
#include "small.h"

namespace microscale {
namespace {

constexpr int64_t kMaxRows = 64;  // whose sums one thread holds at a time

// The kernels for these weights and activations at `level`, or null where the level is not to be had.
const Dense *dense_for(int level, int weight_dtype, int dtype) {
  if (level < 0 || level > ms_level()) return nullptr;
#ifdef MICROSCALE_HAVE_AVX512_BF16
  if (level >= MS_AVX512_BF16 && weight_dtype == MS_BF16 && dtype == MS_BF16) return &avx512_bf16_dense;
#endif
#ifdef MICROSCALE_HAVE_AVX512
  if (level >= MS_AVX512) return &avx512_dense;
#endif
#ifdef MICROSCALE_HAVE_AVX2
  if (level >= MS_AVX2) return &avx2_dense;
#endif
  (void)weight_dtype, (void)dtype;
  return &plain_dense;
}

struct Columns {
  DenseProduct whole;  // but for what a part says
  void (*product)(const DenseProduct *);
  const DensePart *parts;
  int64_t each;                 // columns of a unit
  int64_t weight_bytes, bytes;  // of an element of w, and of y
  float *sums;
  int64_t sums_each;

  int64_t units_of(const DensePart &part) const { return (part.n + each - 1) / each; }

  static void run(void *context, int64_t unit, int thread) {
    const Columns &c = *static_cast<const Columns *>(context);
    const DensePart *part = c.parts;
    int64_t before = 0;  // columns of parts
    for (; unit >= c.units_of(*part); ++part) unit -= c.units_of(*part), before += part->n;
    const int64_t first = unit * c.each;
    DenseProduct p = c.whole;
    p.n = std::min(c.each, part->n - first);
    p.weight_step = part->w_stride * c.weight_bytes;
    p.weights = static_cast<const uint8_t *>(part->w) + first * p.weight_step;
    if (part->bias) p.bias = static_cast<const uint8_t *>(part->bias) + first * c.weight_bytes;
    p.y += (before + first) * c.bytes;
    p.sums = c.sums + thread * c.sums_each;
    c.product(&p);
  }
};

// Long enough that a thread mostly reads ahead in one stretch, and enough units that nobody waits long for the last.
int64_t columns_each(int64_t n, int64_t column_bytes, int threads) {
  constexpr int64_t kUnit = 1 << 20, kUnits = 8;
  const int64_t fit = std::max<int64_t>(kUnit / std::max<int64_t>(column_bytes, 1), 1);
  const int64_t fair = (n + kUnits * threads - 1) / (kUnits * threads);
  return std::min<int64_t>(std::min(fit, std::max<int64_t>((fair + 15) / 16 * 16, 16)), 4096);
}

}  // namespace

int dense_parts(int level, int weight_dtype, const DensePart *parts, int64_t count, int64_t k, int dtype, const void *x,
                int64_t x_stride, int64_t m, void *y, int threads) {
  if (weight_dtype < 0 || weight_dtype >= MS_DTYPES || dtype < 0 || dtype >= MS_DTYPES || k < 0 || m < 0 || threads < 1)
    return MS_BAD_ARGUMENT;
  int64_t n = 0;
  for (int64_t i = 0; i < count; n += parts[i++].n)
    if (parts[i].n < 0) return MS_BAD_ARGUMENT;
  const Dense *dense = dense_for(level, weight_dtype, dtype);
  if (!dense) return MS_BAD_LEVEL;
  if (m == 0 || n == 0) return MS_OK;

  Columns c{};
  c.parts = parts;
  c.weight_bytes = element_bytes(weight_dtype);
  c.bytes = element_bytes(dtype);
  // Waking a thread costs microseconds, in which one core reads some 100 KB.
  if (n * k * c.weight_bytes * std::min<int64_t>(m, 16) < (1 << 17)) threads = 1;
  c.product = dense->product[weight_dtype];
  c.each = columns_each(n, k * c.weight_bytes, threads);
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) units += c.units_of(parts[i]);
  const int64_t most = std::min(m, kMaxRows);
  c.sums_each = most * c.each + kApart / 4;
  Buffer<float> sums(c.sums_each * threads);
  Buffer<const void *> rows(most);
  const Small *small = small_for(level);
  const bool convert = dense->operand != dtype;
  Buffer<float> converted(convert ? most * k : 0);
  if (!sums || !rows || !converted) return MS_NO_MEMORY;
  c.sums = sums.get();
  c.whole.k = k;
  c.whole.rows = rows.get();
  c.whole.dtype = dtype;
  c.whole.y_step = n * c.bytes;
  for (int64_t row = 0; row < m; row += kMaxRows) {
    c.whole.m = std::min(m - row, kMaxRows);
    c.whole.y = static_cast<uint8_t *>(y) + row * c.whole.y_step;
    for (int64_t i = 0; i < c.whole.m; ++i) {
      const uint8_t *from = static_cast<const uint8_t *>(x) + (row + i) * x_stride * c.bytes;
      rows[i] = from;
      if (!convert) continue;
      small->load(dtype, from, k, converted.get() + i * k);
      rows[i] = converted.get() + i * k;
    }
    parallel(threads, units, Columns::run, &c);
  }
  return MS_OK;
}

}  // namespace microscale

extern "C" int ms_dense(int level, int weight_dtype, const void *w, int64_t w_stride, int64_t n, int64_t k,
                        const void *bias, int dtype, const void *x, int64_t x_stride, int64_t m, void *y, int threads) {
  const microscale::StandardFloats floats;
  const microscale::DensePart part{w, w_stride, n, bias};
  return microscale::dense_parts(level, weight_dtype, &part, 1, k, dtype, x, x_stride, m, y, threads);
}

extern "C" int ms_rms_norm(int level, int dtype, const void *x, int64_t m, int64_t n, int weight_dtype, const void *w,
                           float epsilon, void *y) {
  using namespace microscale;
  const StandardFloats floats;
  if (dtype < 0 || dtype >= MS_DTYPES || weight_dtype < 0 || weight_dtype >= MS_DTYPES || m < 0 || n < 1)
    return MS_BAD_ARGUMENT;
  const Small *small = small_for(level);
  if (!small) return MS_BAD_LEVEL;
  const int64_t step = n * element_bytes(dtype);
  for (int64_t i = 0; i < m; ++i) {
    const SmallNorm p{dtype, static_cast<const uint8_t *>(x) + i * step, nullptr, nullptr, weight_dtype, w, n, epsilon,
                      0,     static_cast<uint8_t *>(y) + i * step};
    small->norm(&p);
  }
  return MS_OK;
}
