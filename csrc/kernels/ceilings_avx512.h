// Reading with 512-bit loads, and registers to multiply in.
#pragma once
#include <immintrin.h>

#include "ceilings.h"

namespace microscale {
namespace {

inline uint64_t read512(const uint8_t *from, int64_t bytes) {
  __m512i seen[8];
  for (__m512i &v : seen) v = _mm512_setzero_si512();
  for (int64_t i = 0; i < bytes; i += 512) {
    for (int j = 0; j < 8; ++j) _mm_prefetch(reinterpret_cast<const char *>(from + i + 1024 + 64 * j), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) seen[j] = _mm512_xor_si512(seen[j], _mm512_load_si512(from + i + 64 * j));
  }
  __m512i all = seen[0];
  for (int j = 1; j < 8; ++j) all = _mm512_xor_si512(all, seen[j]);
  return static_cast<uint64_t>(_mm512_reduce_or_epi64(all));
}

// Enough sums in flight for the longest latency times two a cycle. `add(sum, negative)` takes a product into a sum, or
// takes it out again.
template <class Add>
int64_t multiply512(int64_t rounds, int64_t flops, float *sink, Add add) {
  constexpr int kSums = 24;
  __m512 s[kSums];
  for (int j = 0; j < kSums; ++j) s[j] = _mm512_set1_ps(operand(j));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) s[j] = add(s[j], false);
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) s[j] = add(s[j], true);
  }
  for (const __m512 &v : s) *sink += _mm512_reduce_add_ps(v);
  return rounds * 2 * kSums * flops;
}

}  // namespace
}  // namespace microscale
