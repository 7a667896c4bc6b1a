// AVX-512 vectors for gemm.h: 16 columns in float32 lanes, with bf16 or float32 operands.
#pragma once
#include "decode_avx512.h"

namespace microscale {
namespace {

struct Avx512 {
  using Sum = __m512;
  using Total = __m512;
  static constexpr int kPanels = 2, kSinglePanels = 4;
  static constexpr int64_t kAhead = 1;           // tiles that codes are fetched ahead
  static constexpr int64_t kScratch = 16 << 10;  // half of a small L1: the rest is for rows

  static Sum no_sum() { return _mm512_setzero_ps(); }
  static Total no_total() { return _mm512_setzero_ps(); }
  static Total load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Total t) { _mm512_storeu_ps(p, t); }
  static void prefetch(const uint8_t *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char *>(p + i), _MM_HINT_T0);
  }
  template <class D, bool kSpecial>
  static void add_block(Total &total, Sum sum, __m512 scale) {
    if constexpr (kSpecial && D::kShift != 0) sum = _mm512_mul_ps(sum, _mm512_set1_ps(power_of_two(D::kShift)));
    total = _mm512_fmadd_ps(sum, scale, total);
  }
};

// Each decoded vector is 16 columns x 1 k.
struct Avx512F32 : Avx512 {
  using Operand = float;
  using Weights = __m512;
  static constexpr int kStep = 1;
  static constexpr int kDirect = 4, kRows = 6;

  static void multiply(Sum &sum, const Weights &w, const Operand *x) {
    sum = _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum);
  }
  template <class Emit>
  static void emit(int pair, __m512i v, Emit &&emit) {
    emit(2 * pair, _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)));
    emit(2 * pair + 1, _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
  }
};

template <class V, int kFormat_>
struct Decoder512 {
  static constexpr int kFormat = kFormat_;
  static constexpr int kShift = Codes<kFormat>::kShift;
  static constexpr int64_t kTileBytes = tile_bytes(kFormat);
  static constexpr int kBlocks = kFormat == MS_NVFP4 ? 2 : 1;
  const Codes<kFormat> codes;

  static constexpr int kParts = traits(kFormat).bits == 8 ? 8 : 4;  // vectors of a tile's codes

  static constexpr int order(int i) { return i; }
  template <bool kSpecial, class Emit>
  void steps(const uint8_t *tile, int part, Emit emit) const {
    constexpr int kPairs = 16 / kParts;
    codes.template pairs<kSpecial>(tile, part * kPairs, part * kPairs + kPairs,
                                   [&](int pair, __m512i v) { V::emit(pair, v, emit); });
  }
  template <bool kSpecial>
  static __m512 scale(const uint8_t *scales, int64_t tile, int block) {
    return scale512<kFormat, kSpecial>(scales, tile, block);
  }
};

}  // namespace
}  // namespace microscale
