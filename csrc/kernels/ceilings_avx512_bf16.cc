// AVX-512 with bfloat16 dot products.
#include "ceilings_avx512.h"

namespace microscale {
namespace {

int64_t multiply(int64_t rounds, float *sink) {
  const __m512i w = _mm512_load_si512(kOperands.bf16), x = _mm512_load_si512(kOperands.bf16 + 32);
  const __m512i minus = _mm512_xor_si512(x, _mm512_set1_epi16(static_cast<short>(0x8000)));
  return multiply512(rounds, 16 * 2 * 2, sink, [=](__m512 s, bool out) {
    return _mm512_dpbf16_ps(s, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(out ? minus : x));
  });
}

}  // namespace

extern const Ceilings avx512_bf16_ceilings = {read512, multiply};

}  // namespace microscale
