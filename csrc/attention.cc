// Attention of few queries with keys and values where a cache has them.
#include <algorithm>

#include "buffer.h"
#include "floats.h"
#include "kernels/attend_table.h"
#include "operands.h"
#include "parallel.h"

namespace microscale {
namespace {

struct Attention {
  void (*attend)(const Attend *);
  const ms_attention *a;
  int64_t size;    // bytes of a number
  int64_t group;   // heads that share a key head
  int64_t pieces;  // of a group
  float *scratch;
  int64_t scratch_each;

  // A unit is up to kQueries heads of one query.
  static void run(void *context, int64_t unit, int thread) {
    const Attention &c = *static_cast<const Attention *>(context);
    const ms_attention &a = *c.a;
    const int64_t piece = unit % c.pieces, key_head = unit / c.pieces % a.key_heads;
    const int64_t query = unit / c.pieces / a.key_heads % a.queries, batch = unit / c.pieces / a.key_heads / a.queries;
    const int64_t head = key_head * c.group + piece * kQueries;
    Attend p{};
    p.dtype = a.dtype;
    p.heads = std::min(kQueries, c.group - piece * kQueries);
    p.tokens = a.tokens;
    p.width = a.width;
    p.value_width = a.value_width;
    const auto at = [&](const void *from, const int64_t *strides, int64_t h, int64_t t) {
      return static_cast<const uint8_t *>(from) + (batch * strides[0] + h * strides[1] + t * strides[2]) * c.size;
    };
    p.q = at(a.q, a.q_strides, head, query);
    p.k = at(a.k, a.k_strides, key_head, 0);
    p.v = at(a.v, a.v_strides, key_head, 0);
    p.q_step = a.q_strides[1] * c.size;
    p.k_step = a.k_strides[2] * c.size;
    p.v_step = a.v_strides[2] * c.size;
    p.mask = a.mask ? a.mask + batch * a.mask_strides[0] + query * a.mask_strides[1] : nullptr;
    p.sinks = a.sinks ? static_cast<const uint8_t *>(a.sinks) + head * c.size : nullptr;
    p.scale = a.scale;
    p.y = static_cast<uint8_t *>(a.y) + ((batch * a.queries + query) * a.heads + head) * a.value_width * c.size;
    p.scratch = c.scratch + thread * c.scratch_each;
    c.attend(&p);
  }
};

void (*attend_for(int level))(const Attend *) {
  if (level < 0 || level > ms_level()) return nullptr;
#ifdef MICROSCALE_HAVE_AVX512
  if (level >= MS_AVX512) return avx512_attend;
#endif
#ifdef MICROSCALE_HAVE_AVX2
  if (level >= MS_AVX2) return avx2_attend;
#endif
  return plain_attend;
}

}  // namespace
}  // namespace microscale

extern "C" int ms_attend(int level, const struct ms_attention *a, int threads) {
  using namespace microscale;
  const StandardFloats floats;
  if (!a || a->dtype < 0 || a->dtype >= MS_DTYPES || a->batch < 0 || a->queries < 0 || a->tokens < 0 ||
      a->key_heads < 1 || a->heads < 1 || a->heads % a->key_heads || a->width < 1 || a->value_width < 0 || threads < 1)
    return MS_BAD_ARGUMENT;
  Attention c{};
  c.attend = attend_for(level);
  if (!c.attend) return MS_BAD_LEVEL;
  c.a = a;
  c.size = element_bytes(a->dtype);
  c.group = a->heads / a->key_heads;
  c.pieces = (c.group + kQueries - 1) / kQueries;
  const int64_t units = a->batch * a->queries * a->key_heads * c.pieces;
  // Waking a thread costs microseconds, in which one core takes in some 50 KB of keys and values.
  if (units * a->tokens * (a->width + a->value_width) * c.size < (1 << 17)) threads = 1;
  c.scratch_each = (attend_scratch(a->tokens, a->width) + 15) / 16 * 16 + kApart / 4;
  Buffer<float> scratch(c.scratch_each * threads);
  if (!scratch) return MS_NO_MEMORY;
  c.scratch = scratch.get();
  parallel(threads, units, Attention::run, &c);
  return MS_OK;
}
