// The rows of an activation matrix as a level's kernels want them.
#pragma once
#include "buffer.h"
#include "kernels/table.h"

namespace microscale {

inline int64_t element_bytes(int dtype) { return dtype == MS_FP32 ? 4 : 2; }
inline int64_t padded_k(int64_t k) { return (k + 31) / 32 * 32; }

// Bytes between rows of our own: a line more than the numbers, so that rows a power of two long do not all fall into the
// same set of the cache.
inline int64_t operand_spacing(int operand, int64_t k) { return padded_k(k) * element_bytes(operand) + 64; }

// m rows, used where they are if the kernels can and converted otherwise. `source[i]` is the row of x that row i takes,
// null: i itself. `factor[i]` multiplies it, null: 1. `spaced`: rows must be equally far apart.
class Operands {
 public:
  // False: no memory.
  bool prepare(const Kernels &kernels, int dtype, const void *x, int64_t x_stride, int64_t k, int64_t m,
               const int64_t *source, const float *factor, int threads);
  const void *const *rows() const { return rows_.get(); }
  int64_t spacing() const { return spacing_; }  // bytes, 0: not equal

 private:
  Buffer<const void *> rows_;
  Buffer<uint8_t> converted_;
  int64_t spacing_ = 0;
};

}  // namespace microscale
