// Which kernels run a call.
#pragma once
#include "kernels/table.h"

namespace microscale {

// The kernels for activations of `dtype` at `level`, or null where the level is not to be had. The widest levels
// multiply bfloat16 only; other activations take the float32 kernels below them. `special`: some weight has MS_SPECIAL.
const Kernels *kernels_for(int level, int dtype, bool special);

}  // namespace microscale
