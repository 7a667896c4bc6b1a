// AVX-512 vectors for gemm.h: 16 columns in float32 lanes, with bf16 or float32 operands.
#pragma once
#include "decode_avx512.h"

namespace microscale {
namespace {

struct Avx512 {
  using Sum = __m512;
  using Total = __m512;
  static constexpr int kUnits = 1, kPanels = 2;
  static constexpr int few(int, int bits) { return bits == 8 ? 16 : 64; }
  static constexpr int64_t kScratch = 16 << 10;  // half of a small L1: the rest is for rows

  static Sum no_sum() { return _mm512_setzero_ps(); }
  static Total no_total() { return _mm512_setzero_ps(); }
  static Total load(const float *p) { return _mm512_loadu_ps(p); }
  template <class D>
  static void store(float *p, Total t) {
    _mm512_storeu_ps(p, t);
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
  static constexpr int kRows = 8, kDecodedRows = 6;
  static constexpr int at_once(int rows, int, int) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

  static void multiply(Sum &sum, const Weights &w, const Operand *x) {
    sum = _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum);
  }
  template <class Emit>
  static void emit(int pair, __m512i v, Emit &&emit) {
    emit(2 * pair, _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)));
    emit(2 * pair + 1, _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
  }
  template <class Emit>
  static void emit_floats(int pair, __m512 even, __m512 odd, __m512i, Emit &&emit) {
    emit(2 * pair, even);
    emit(2 * pair + 1, odd);
  }
};

// 8 bits, integers: converted where they stand, in the top byte of a float's integer, and so too large by 2^24.
struct alignas(64) TopControls {
  int8_t byte[2][64];  // bytes 1 and 2 of each dword to its top, zeros below
  uint16_t upper[32];  // the upper words of two registers' dwords, in turn
};
constexpr TopControls top_controls() {
  TopControls t{};
  for (int i = 0; i < 64; ++i)
    for (int from = 0; from < 2; ++from) t.byte[from][i] = static_cast<int8_t>(i % 4 == 3 ? i % 16 - 2 + from : -1);
  for (int i = 0; i < 32; ++i) t.upper[i] = static_cast<uint16_t>(i % 2 * 32 + i / 2 * 2 + 1);
  return t;
}
struct TopBytes {
  static constexpr TopControls kControls = top_controls();
  const __m512i second = load512(kControls.byte[0]), third = load512(kControls.byte[1]);
  const __m512i upper = load512(kControls.upper);

  template <class V, bool kSpecial, class Emit>
  void part(const uint8_t *tile, int part, Emit &&emit) const {
    const auto value = [](__m512i v) { return _mm512_cvtepi32_ps(v); };
    const __m512i v = load512(tile + 64 * part), top = _mm512_set1_epi32(static_cast<int>(0xff000000));
    V::emit_floats(2 * part, value(_mm512_slli_epi32(v, 24)), value(_mm512_shuffle_epi8(v, third)), upper, emit);
    V::emit_floats(2 * part + 1, value(_mm512_shuffle_epi8(v, second)), value(_mm512_and_si512(v, top)), upper, emit);
  }
};

// Other formats: the codes of decode_avx512.h.
template <int kFormat>
struct SharedCodes : Codes<kFormat> {
  template <class V, bool kSpecial, class Emit>
  void part(const uint8_t *tile, int part, Emit &&emit) const {
    constexpr int kPairs = traits(kFormat).bits == 8 ? 2 : 4;
    this->template pairs<kSpecial>(tile, kPairs * part, kPairs * part + kPairs,
                                   [&](int pair, __m512i v) { V::emit(pair, v, emit); });
  }
};
template <>
struct SharedCodes<MS_MXINT8> : TopBytes {};

template <class V, int kFormat_>
struct Decoder512 {
  static constexpr int kFormat = kFormat_;
  static constexpr int kShift = Codes<kFormat>::kShift;
  static constexpr int64_t kTileBytes = tile_bytes(kFormat);
  static constexpr int kBlocks = kFormat == MS_NVFP4 ? 2 : 1;
  const SharedCodes<kFormat> codes;

  static constexpr int kParts = traits(kFormat).bits == 8 ? 8 : 4;  // vectors of a tile's codes

  static constexpr int64_t kUnitCodes = 0, kUnitScales = 0;
  template <bool kSpecial, class Emit>
  void steps(const uint8_t *tile, int part, Emit emit) const {
    codes.template part<V, kSpecial>(tile, part, emit);
  }
  template <bool kSpecial>
  static __m512 scale(const uint8_t *scales, int64_t tile, int block) {
    return scale512<kFormat, kSpecial>(scales, tile, block);
  }
};

}  // namespace
}  // namespace microscale
