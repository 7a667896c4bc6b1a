// AVX2 and FMA.
#include <immintrin.h>

#include "ceilings.h"

namespace microscale {
namespace {

uint64_t read(const uint8_t *from, int64_t bytes) {
  __m256i seen[8];
  for (__m256i &v : seen) v = _mm256_setzero_si256();
  for (int64_t i = 0; i < bytes; i += 256) {
    for (int j = 0; j < 4; ++j) _mm_prefetch(reinterpret_cast<const char *>(from + i + 1024 + 64 * j), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      seen[j] = _mm256_xor_si256(seen[j], _mm256_load_si256(reinterpret_cast<const __m256i *>(from + i + 32 * j)));
  }
  uint64_t all = 0;
  for (const __m256i &v : seen)
    all ^= static_cast<uint64_t>(_mm256_extract_epi64(v, 0) ^ _mm256_extract_epi64(v, 1) ^ _mm256_extract_epi64(v, 2) ^
                                 _mm256_extract_epi64(v, 3));
  return all;
}

int64_t multiply(int64_t rounds, float *sink) {
  constexpr int kSums = 12;
  float a[8], b[8], total[8];
  for (int i = 0; i < 8; ++i) a[i] = operand(i), b[i] = operand(8 + i);
  const __m256 w = _mm256_loadu_ps(a), x = _mm256_loadu_ps(b), minus = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
  __m256 s[kSums];
  for (__m256 &v : s) v = w;
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) s[j] = _mm256_fmadd_ps(w, x, s[j]);
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) s[j] = _mm256_fmadd_ps(w, minus, s[j]);
  }
  for (const __m256 &v : s) {
    _mm256_storeu_ps(total, v);
    for (const float t : total) *sink += t;
  }
  return rounds * 2 * kSums * 8 * 2;
}

}  // namespace

extern const Ceilings avx2_ceilings = {read, multiply};

}  // namespace microscale
