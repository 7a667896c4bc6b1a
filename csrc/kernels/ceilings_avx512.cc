// AVX-512: float32 multiplication.
#include "ceilings_avx512.h"

namespace microscale {
namespace {

int64_t multiply(int64_t rounds, float *sink) {
  float a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = operand(i), b[i] = operand(16 + i);
  const __m512 w = _mm512_loadu_ps(a), x = _mm512_loadu_ps(b), minus = _mm512_sub_ps(_mm512_setzero_ps(), x);
  return multiply512(rounds, 16 * 2, sink, [=](__m512 s, bool out) { return _mm512_fmadd_ps(w, out ? minus : x, s); });
}

}  // namespace

extern const Ceilings avx512_ceilings = {read512, multiply};

}  // namespace microscale
