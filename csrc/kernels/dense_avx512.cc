// AVX-512: weights become float32 in registers.
#include <immintrin.h>

#include "dense.h"

namespace microscale {
namespace {

struct Avx512 {
  using Operand = float;
  using Weights = __m512;
  using Sum = __m512;
  static constexpr int64_t kLanes = 16;
  static constexpr int kParts = 2, kRows = 6;
  static constexpr int columns(int rows) { return rows < 3 ? 1 : rows < 4 ? 4 : rows == 4 ? 3 : 2; }

  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static Sum zero() { return _mm512_setzero_ps(); }
  template <int kDtype>
  static Weights weights(const uint8_t *p) {
    if constexpr (kDtype == MS_FP32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return widened<kDtype>(half);
  }
  template <int kDtype>
  static Weights weights(const uint8_t *p, int64_t count) {
    if constexpr (kDtype == MS_FP32) return _mm512_maskz_loadu_ps(first(count), p);
    return widened<kDtype>(_mm256_maskz_loadu_epi16(first(count), p));
  }
  template <int kDtype>
  static __m512 widened(__m256i half) {
    if constexpr (kDtype == MS_FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static __m512 operands(const Operand *x) { return _mm512_loadu_ps(x); }
  static __m512 operands(const Operand *x, int64_t count) { return _mm512_maskz_loadu_ps(first(count), x); }
  static Sum multiply(Sum sum, Weights w, __m512 x) { return _mm512_fmadd_ps(w, x, sum); }
  static float total(const Sum (&sum)[kParts]) { return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])); }
};

}  // namespace

extern const Dense avx512_dense = {
    MS_FP32,
    {dense_product<Avx512, MS_BF16>, dense_product<Avx512, MS_FP16>, dense_product<Avx512, MS_FP32>},
};

}  // namespace microscale
