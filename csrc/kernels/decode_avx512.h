// Codes to bfloat16 in AVX-512 registers: 16 columns x 2 k at a time, exact, block scales left out.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "../layout.h"
#include "elements.h"
#include "inline.h"

namespace microscale {
namespace {

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
struct AsIs {
  __m512i operator()(__m512i v) const { return v; }
};
inline __m512i words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

// `pairs<kSpecial>(tile, first, last, f, lower)` calls f(pair, bf16) for the pairs of k in [first, last), in order.
// Dword n of a bf16 vector is column n: k = 2 pair in its low half, 2 pair + 1 in its high one.
// Numbers come as they are, or raised (see raised_table); `lower` scales those down again.
enum Raise { kAsIs, kRaised, kFlagged };
template <int N, Raise kRaise_>
constexpr Table16<N> table_of(Encoding e, int codes) {
  return kRaise_ == kAsIs ? bf16_table<N>(e, codes) : raised_table<N>(e, codes, kRaise_ == kFlagged);
}

// 4 bits: a 32-entry lookup reads the low five bits of a word, and entries repeat after 16: no mask is needed.
template <Raise kHow>
struct FourBits {
  static constexpr auto kTable = table_of<32, kHow>(kE2M1, 16);
  const __m512i table = load512(&kTable);

  template <bool kSpecial, class F, class Lower = AsIs>
  MS_INLINE void pairs(const uint8_t *tile, int first, int last, F f, Lower lower = {}) const {
#pragma GCC unroll 4
    for (int q = first / 4; q < last / 4; ++q) {
      const __m512i v = load512(tile + 64 * q);
      f(4 * q, lower(_mm512_permutexvar_epi16(v, table)));
      f(4 * q + 1, lower(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), table)));
      f(4 * q + 2, lower(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table)));
      f(4 * q + 3, lower(_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), table)));
    }
  }
};

// 6 bits: all 64 values in two registers; the lookup reads the low six bits of a word.
template <Encoding kEncoding, Raise kHow>
struct SixBits {
  static constexpr auto kTable = table_of<64, kHow>(kEncoding, 64);
  const __m512i low = load512(&kTable), high = load512(kTable.entry + 32);

  template <bool kSpecial, class F, class Lower = AsIs>
  MS_INLINE void pairs(const uint8_t *tile, int first, int last, F f, Lower lower = {}) const {
    const __m512i four = words(15);
#pragma GCC unroll 4
    for (int q = first / 4; q < last / 4; ++q) {
      const __m512i v = load512(tile + 64 * q);
      const __m512i two = load512(tile + 256 + 64 * (q / 2));
      const __m512i top = q % 2 ? _mm512_srli_epi16(two, 4) : _mm512_slli_epi16(two, 4);
      const auto value = [&](__m512i lows, __m512i highs) {
        return lower(_mm512_permutex2var_epi16(low, _mm512_ternarylogic_epi32(four, lows, highs, 0xca), high));
      };
      f(4 * q, value(v, top));
      f(4 * q + 1, value(_mm512_srli_epi16(v, 4), _mm512_srli_epi16(top, 2)));
      f(4 * q + 2, value(_mm512_srli_epi16(v, 8), _mm512_srli_epi16(top, 4)));
      f(4 * q + 3, value(_mm512_srli_epi16(v, 12), q % 2 ? _mm512_srli_epi16(two, 10) : _mm512_srli_epi16(two, 2)));
    }
  }
};

// 8 bits, floats: the exponent's bias is changed by an addition; the few subnormals come from a table.
template <Encoding kEncoding, Raise kHow>
struct EightBits {
  static constexpr auto kTable = table_of<32, kHow>(kEncoding, 8);
  const __m512i table = load512(&kTable);

  template <bool kSpecial, class Lower>
  MS_INLINE __m512i value(__m512i v, Lower lower) const {  // words with a code in their high byte and zeros below
    constexpr int kTop = kEncoding.exponent_bits == 4 ? 0x7f00 : 0x7c00;  // the smallest code that is no number
    const __m512i magnitude = _mm512_and_si512(v, words(0x7f00));
    __m512i r = _mm512_add_epi16(_mm512_srli_epi16(magnitude, 8 - kEncoding.exponent_bits),
                                 words((127 - kEncoding.bias + (kHow == kAsIs ? 0 : kRaise)) << 7));
    const auto subnormal =
        _mm512_testn_epi16_mask(v, words(((1 << kEncoding.exponent_bits) - 1) << (8 + kEncoding.mantissa_bits)));
    r = _mm512_mask_permutexvar_epi16(r, subnormal, _mm512_srli_epi16(magnitude, 8), table);
    if (kSpecial) {
      const auto top = _mm512_cmpge_epu16_mask(magnitude, words(kTop));
      r = _mm512_or_si512(r, _mm512_maskz_mov_epi16(top, words(kEncoding.exponent_bits == 4 ? 0x7fc0 : 0x7f80)));
    }
    return _mm512_ternarylogic_epi32(words(-0x8000), v, lower(r), 0xca);
  }

  template <bool kSpecial, class F, class Lower = AsIs>
  MS_INLINE void pairs(const uint8_t *tile, int first, int last, F f, Lower lower = {}) const {
#pragma GCC unroll 8
    for (int q = first / 2; q < last / 2; ++q) {
      const __m512i v = load512(tile + 64 * q);
      f(2 * q, value<kSpecial>(_mm512_slli_epi16(v, 8), lower));
      f(2 * q + 1, value<kSpecial>(_mm512_and_si512(v, words(-0x100)), lower));
    }
  }
};

// 8 bits, integers: converted where they stand, in the top byte of a float's integer, and so too large by 2^24.
struct Integers {
  template <bool kSpecial, class F, class Lower = AsIs>
  MS_INLINE void pairs(const uint8_t *tile, int first, int last, F f, Lower lower = {}) const {
    const auto value = [](__m512i even, __m512i odd) {
      const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(even));
      const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(odd));
      return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
    };
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xff000000));
#pragma GCC unroll 8
    for (int q = first / 2; q < last / 2; ++q) {
      const __m512i v = load512(tile + 64 * q);
      f(2 * q, lower(value(_mm512_slli_epi32(v, 24), _mm512_and_si512(_mm512_slli_epi32(v, 8), top))));
      f(2 * q + 1, lower(value(_mm512_and_si512(_mm512_slli_epi32(v, 16), top), _mm512_and_si512(v, top))));
    }
  }
};

// What a format's codes are, and 2^kShift, by which its decoded codes must be multiplied.
template <int kFormat, Raise kHow = kAsIs>
struct Codes;
template <Raise kHow>
struct Codes<MS_MXFP4, kHow> : FourBits<kHow> {
  static constexpr int kShift = 0;
};
template <Raise kHow>
struct Codes<MS_NVFP4, kHow> : FourBits<kHow> {
  static constexpr int kShift = 0;
};
template <Raise kHow>
struct Codes<MS_MXFP6_E2M3, kHow> : SixBits<kE2M3, kHow> {
  static constexpr int kShift = 0;
};
template <Raise kHow>
struct Codes<MS_MXFP6_E3M2, kHow> : SixBits<kE3M2, kHow> {
  static constexpr int kShift = 0;
};
template <Raise kHow>
struct Codes<MS_MXFP8_E4M3, kHow> : EightBits<kE4M3, kHow> {
  static constexpr int kShift = 0;
};
template <Raise kHow>
struct Codes<MS_MXFP8_E5M2, kHow> : EightBits<kE5M2, kHow> {
  static constexpr int kShift = 0;
};
template <Raise kHow>
struct Codes<MS_FP8_BLOCK128, kHow> : EightBits<kE4M3, kHow> {
  static constexpr int kShift = 0;
};
template <Raise kHow>
struct Codes<MS_MXINT8, kHow> : Integers {
  static constexpr int kShift = -30;
};

// 16 columns' scales of one block as float32, times 2^kShift unless special. `scales` are the tile's (block FP8: the
// panel's).
template <int kFormat, bool kSpecial>
inline __m512 scale512(const uint8_t *scales, int64_t tile, int block) {
  constexpr int kShift = Codes<kFormat>::kShift;
  if constexpr (kFormat == MS_FP8_BLOCK128) {
    return _mm512_set1_ps(reinterpret_cast<const float *>(scales)[tile / 4]);
  } else if constexpr (kFormat == MS_NVFP4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(scales + 16 * block));
    // As float16 an E4M3 number is too small by 2^8, its subnormals too. Only special ones have a sign.
    const __m128i magnitude = kSpecial ? _mm_and_si128(bytes, _mm_set1_epi8(0x7f)) : bytes;
    const __m256i half = _mm256_slli_epi16(_mm256_cvtepu8_epi16(magnitude), 7);
    __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
    if (kSpecial) {
      const __m512i s = _mm512_cvtepu8_epi32(bytes);
      const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(s, _mm512_set1_epi32(0x80)), 24);
      value = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
      const auto nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(s, _mm512_set1_epi32(0x7f)), _mm512_set1_epi32(0x7f));
      value = _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
    }
    return value;
  } else {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(scales));
    if (!kSpecial && kShift != 0)  // far from 1 only where all codes are zero: anything finite will do
      bytes = _mm_min_epu8(_mm_max_epu8(bytes, _mm_set1_epi8(32)), _mm_set1_epi8(static_cast<char>(222)));
    const __m512i s = _mm512_cvtepu8_epi32(bytes);
    __m512i value = _mm512_slli_epi32(s, 23);
    if (!kSpecial && kShift != 0) value = _mm512_add_epi32(value, _mm512_set1_epi32(kShift * (1 << 23)));
    if (kSpecial) {
      value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(s, _mm512_setzero_si512()),
                                    _mm512_set1_epi32(0x00400000));
      value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(s, _mm512_set1_epi32(255)),
                                    _mm512_set1_epi32(0x7fc00000));
    }
    return _mm512_castsi512_ps(value);
  }
}

}  // namespace
}  // namespace microscale
