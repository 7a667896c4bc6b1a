// Products of the same rows with several weights side by side.
#pragma once
#include <cstdint>

namespace microscale {

struct DensePart {
  const void *w;  // as ms_dense's
  int64_t w_stride, n;
  const void *bias;
};

// ms_dense for `count` weights in one parallel loop: y [m, sum of n], one part's results behind the other's.
int dense_parts(int level, int weight_dtype, const DensePart *parts, int64_t count, int64_t k, int dtype, const void *x,
                int64_t x_stride, int64_t m, void *y, int threads);

}  // namespace microscale
