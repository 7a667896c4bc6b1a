// What one instruction set level offers to the drivers: plain function pointers, so that code compiled for a level is
// reached in no other way. Units compiled for a level include only this, <stdint.h> and intrinsics: a header with
// inline functions of external linkage would leave copies that need the level in the hands of the linker.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../microscale.h"

namespace microscale {

// out[i][c] = sum over k of rows[i][k] * weight[16 * first + c][k], block scales included, float32.
struct Product {
  const uint8_t *weights;   // the expert's first byte
  int64_t n, k;             // of the weights
  int64_t first, count;     // panels
  const void *const *rows;  // [m] operands, readable and finite up to k rounded up to 32; tiled: rows[0] alone counts
  int64_t m;
  float *out;           // [m][stride], and anything in further rows of the last tile (see tile_rows())
  int64_t stride;       // elements, at least 16 * count
  void *scratch;        // Kernels::scratch bytes, aligned to 64
  int special;          // the tensor has MS_SPECIAL
  int *state;           // of a unit of work, 0 at its start: kernels keep there what they need not set up again
  const uint8_t *next;  // weights that are read after these, to be fetched ahead; may be any address
};

// Float32 rows to operands of the second product: activation(raw * outer + bias), of at most 32 columns if stored.
struct Activate {
  const float *gate, *up;  // [m][stride] raw sums; interleaved: gate holds both; ungated: up is not read
  int64_t stride;
  int64_t m, n;                                              // n results a row
  const float *gate_outer, *up_outer, *gate_bias, *up_bias;  // [n] ([2 n] in gate_* where interleaved) or null
  const struct ms_activation *activation;
  void *const *out;  // [m] where each row's n operands go
};

struct Kernels {
  int operand;  // MS_BF16 or MS_FP32: what rows hold
  // Operands of one expert are tiled: up to 16 rows together, 32 k of all of them before the next 32 k (see
  // operands.h).
  int tiled;
  size_t scratch;  // bytes each thread needs
  void (*product[MS_FORMATS])(const Product *);
  void (*end)();  // after a unit's last product; null: nothing to do
  void (*activate)(const Activate *);
  // n elements of `dtype`, times `factor`, to operands: every 32 of them `step` bytes after those before. The rest of
  // the last 32 is zero.
  void (*load)(int dtype, const void *x, int64_t n, float factor, void *operands, int64_t step);
  // sum[i] += weight * (raw[i] * outer[i] + bias[i]); outer and bias may be null.
  void (*add)(const float *raw, const float *outer, const float *bias, float weight, int64_t n, float *sum);
  // raw[i] * outer[i] + bias[i], rounded to `dtype`.
  void (*store)(const float *raw, const float *outer, const float *bias, int64_t n, int dtype, void *y);
};

// One for each level that was compiled in.
extern const Kernels plain_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;

}  // namespace microscale
