#include "small.h"

namespace microscale {

extern const Small avx2_small = {small_norm, small_turn, small_gate, small_load, small_round, small_stored};

}  // namespace microscale
