#define MICROSCALE_WIDTH 16
#include "attend.h"

namespace microscale {

extern void (*const avx512_attend)(const Attend *) = attend;

}  // namespace microscale
