// Root mean square normalisation of a row, in float32.
#pragma once
#include "rows.h"

namespace microscale {
namespace {

inline void rms_norm(int dtype, const void *x, int weight_dtype, const void *w, int64_t n, float epsilon, void *y) {
  f32x16 squares{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32x16 v = load_as(dtype, x, i, lanes_left(n, i));
    squares += v * v;
  }
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += squares[i];
  const float scale = 1 / __builtin_sqrtf(sum / static_cast<float>(n) + epsilon);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = lanes_left(n, i);
    store_as(dtype, y, i, load_as(weight_dtype, w, i, count) * (load_as(dtype, x, i, count) * scale), count);
  }
}

}  // namespace
}  // namespace microscale
