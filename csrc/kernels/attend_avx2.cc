#define MICROSCALE_WIDTH 8
#include "attend.h"

namespace microscale {

extern void (*const avx2_attend)(const Attend *) = attend;

}  // namespace microscale
