// AVX-512 with bfloat16 dot products: two k at a time, summed in float32. The instruction takes subnormal bfloat16
// operands (below 2^-126) as zero.
#include "gemm.h"
#include "rows.h"
#include "v_avx512.h"

namespace microscale {
namespace {

struct Avx512Bf16 : Avx512 {
  using Operand = uint16_t;
  using Weights = __m512i;  // 16 columns x 2 k
  static constexpr int kStep = 2;
  static constexpr int few(int blocks, int bits) { return blocks > 1 || bits == 8 ? 16 : bits == 6 ? 32 : 64; }
  static constexpr int kRows = 8, kDecodedRows = 6;
  // Five rows: measured, docs/cpu.md.
  static constexpr int at_once(int rows, int blocks, int bits) {
    return rows <= 2 ? 4 : rows <= 4 || (rows == 5 && blocks == 1 && bits != 6) ? 2 : 1;
  }

  static void multiply(Sum &sum, const Weights &w, const Operand *x) {
    int32_t both;
    __builtin_memcpy(&both, x, 4);
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)));
  }
  template <class Emit>
  static void emit(int pair, __m512i v, Emit &&emit) {
    emit(pair, v);
  }
  // `upper` takes the upper words of both: exact, where they have at most 8 significant bits.
  template <class Emit>
  static void emit_floats(int pair, __m512 even, __m512 odd, __m512i upper, Emit &&emit) {
    emit(pair, _mm512_permutex2var_epi16(_mm512_castps_si512(even), upper, _mm512_castps_si512(odd)));
  }
};

}  // namespace

#define MS_PRODUCT(format) product<Avx512Bf16, Decoder512<Avx512Bf16, format>>
extern const Kernels avx512_bf16_kernels = {
    MS_BF16,
    0,
    Avx512::kScratch,
    {MS_PRODUCT(MS_MXFP4), MS_PRODUCT(MS_MXFP6_E2M3), MS_PRODUCT(MS_MXFP6_E3M2), MS_PRODUCT(MS_MXFP8_E4M3),
     MS_PRODUCT(MS_MXFP8_E5M2), MS_PRODUCT(MS_MXINT8), MS_PRODUCT(MS_NVFP4), MS_PRODUCT(MS_FP8_BLOCK128)},
    nullptr,
    activate_rows<MS_BF16>,
    load_row<MS_BF16>,
    add_row,
    store_row,
};

}  // namespace microscale
