// Attention of single queries at one instruction set level. As table.h, this is included by units compiled for a level,
// which are reached through it alone.
#pragma once
#include <stdint.h>

#include "../microscale.h"

namespace microscale {

constexpr int64_t kQueries = 4;  // heads that one call takes at most

// For each of `heads` queries of one sequence that share keys and values:
// y = sum over t of softmax_t(scale * q . k[t], sink) * v[t].
struct Attend {
  int dtype;      // of everything
  int64_t heads;  // 1 to kQueries
  int64_t tokens, width, value_width;
  const uint8_t *q, *k, *v;        // of the first head, and of token 0; a head's numbers are contiguous
  int64_t q_step, k_step, v_step;  // bytes from one head, or token, to the next
  const uint8_t *mask;             // [tokens] 0: not looked at; or null
  const uint8_t *sinks;            // [heads] a logit more for the softmax, with no value; or null
  float scale;
  uint8_t *y;      // [heads][value_width], dense
  float *scratch;  // attend_scratch() numbers
};

// Numbers of Attend::scratch. `static`: each unit has its own.
static inline int64_t attend_scratch(int64_t tokens, int64_t width) {
  return kQueries * ((tokens + 15) / 16 * 16 + (width + 15) / 16 * 16);
}

extern void (*const plain_attend)(const Attend *), (*const avx2_attend)(const Attend *),
    (*const avx512_attend)(const Attend *);

}  // namespace microscale
