// Which kernels stand between products.
#pragma once
#include "kernels/small_table.h"

namespace microscale {

// Those of `level`, or null where the level is not to be had.
const Small *small_for(int level);

}  // namespace microscale
