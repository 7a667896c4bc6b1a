// What one instruction set level offers for weights that are not packed, and between products. As table.h, this is
// included by units compiled for a level, which are reached through it alone.
#pragma once
#include <stdint.h>

#include "../microscale.h"

namespace microscale {

// y[i][c] = sum over j of rows[i][j] * weights[c][j] + bias[c]. Nothing needs to be aligned.
struct DenseProduct {
  const uint8_t *weights;   // of column 0
  int64_t weight_step;      // bytes from one column to the next
  int64_t n, k;             // columns, and numbers in each
  const void *const *rows;  // [m] operands
  int64_t m;
  const uint8_t *bias;  // [n] in the weights' dtype, or null
  float *sums;          // [m][n], scratch
  int dtype;            // of y
  uint8_t *y;
  int64_t y_step;  // bytes from one row to the next
};

struct Dense {
  int operand;                                       // MS_BF16 or MS_FP32: what rows hold
  void (*product[MS_DTYPES])(const DenseProduct *);  // by the weights' dtype; null: not with this operand
};

extern const Dense plain_dense, avx2_dense, avx512_dense, avx512_bf16_dense;

}  // namespace microscale
