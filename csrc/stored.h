// Rows of activations, rounded to a format.
#pragma once
#include <cstdint>

#include "kernels/small_table.h"

namespace microscale {

// m rows of k numbers of `dtype`, `x_step` bytes apart, to what they read back as from `format` (see ms_stored) in
// dtype `to`, `y_step` bytes apart. y may be x, row for row, if its numbers are no wider. `outer`: ms_stored's.
void store_rows(const Small &small, int format, int dtype, const void *x, int64_t x_step, int64_t m, int64_t k, int to,
                void *y, int64_t y_step, float *outer, int threads);

}  // namespace microscale
