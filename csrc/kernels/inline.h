// Functions that must be inlined: as calls they would pass registers full of numbers through memory.
#pragma once

#define MS_INLINE inline __attribute__((always_inline))
