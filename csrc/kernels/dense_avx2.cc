// AVX2, FMA and F16C.
#include <immintrin.h>

#include "dense.h"

namespace microscale {
namespace {

struct Avx2 {
  using Operand = float;
  using Weights = __m256;
  using Sum = __m256;
  static constexpr int64_t kLanes = 8;
  static constexpr int kParts = 2, kRows = 3;
  static constexpr int columns(int rows) { return rows < 3 ? 1 : 2; }

  static Sum zero() { return _mm256_setzero_ps(); }
  template <int kDtype>
  static Weights weights(const uint8_t *p) {
    if constexpr (kDtype == MS_FP32) return _mm256_loadu_ps(reinterpret_cast<const float *>(p));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    if constexpr (kDtype == MS_FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <int kDtype>
  static Weights weights(const uint8_t *p, int64_t count) {
    alignas(32) uint8_t part[32] = {};
    __builtin_memcpy(part, p, static_cast<size_t>(count * dtype_bytes(kDtype)));
    return weights<kDtype>(part);
  }
  static __m256 operands(const Operand *x) { return _mm256_loadu_ps(x); }
  static __m256 operands(const Operand *x, int64_t count) {
    return weights<MS_FP32>(reinterpret_cast<const uint8_t *>(x), count);
  }
  static Sum multiply(Sum sum, Weights w, __m256 x) { return _mm256_fmadd_ps(w, x, sum); }
  static float total(const Sum (&sum)[kParts]) {
    const __m256 all = _mm256_add_ps(sum[0], sum[1]);
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
};

}  // namespace

extern const Dense avx2_dense = {
    MS_FP32,
    {dense_product<Avx2, MS_BF16>, dense_product<Avx2, MS_FP16>, dense_product<Avx2, MS_FP32>},
};

}  // namespace microscale
