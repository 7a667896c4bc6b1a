#define MICROSCALE_WIDTH 4
#include "attend.h"

namespace microscale {

extern void (*const plain_attend)(const Attend *) = attend;

}  // namespace microscale
