// AVX-512 with bfloat16 dot products, of bfloat16 weights and rows. The instruction takes subnormal operands (below
// 2^-126) as zero.
#include <immintrin.h>

#include "dense.h"

namespace microscale {
namespace {

struct Avx512Bf16 {
  using Operand = uint16_t;
  using Weights = __m512bh;
  using Sum = __m512;
  static constexpr int64_t kLanes = 32;
  static constexpr int kParts = 1, kRows = 8;
  static constexpr int columns(int rows) { return rows == 1 ? 1 : rows < 7 ? 4 : 3; }

  static __mmask32 first(int64_t count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); }
  static Sum zero() { return _mm512_setzero_ps(); }
  template <int kDtype>
  static Weights weights(const uint8_t *p) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  template <int kDtype>
  static Weights weights(const uint8_t *p, int64_t count) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(first(count), p));
  }
  static Weights operands(const Operand *x) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)); }
  static Weights operands(const Operand *x, int64_t count) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(first(count), x));
  }
  static Sum multiply(Sum sum, Weights w, Weights x) { return _mm512_dpbf16_ps(sum, w, x); }
  static float total(const Sum (&sum)[kParts]) { return _mm512_reduce_add_ps(sum[0]); }
};

}  // namespace

extern const Dense avx512_bf16_dense = {MS_BF16, {dense_product<Avx512Bf16, MS_BF16>, nullptr, nullptr}};

}  // namespace microscale
