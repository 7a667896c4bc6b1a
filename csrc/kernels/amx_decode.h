// Codes of one tile to bfloat16 with their block scales in them, which bfloat16 holds exactly: a power of two changes
// the exponent alone, and an E2M1 code times an E4M3 scale has six significant bits. Block FP8 keeps its scales for
// later.
#pragma once
#include "decode_avx512.h"

namespace microscale {
namespace {

// E4M3 scales as bits of bfloat16 numbers, and those of 1.5 times as much.
struct alignas(64) ScaleTables {
  static constexpr int kTop = (127 + kRaise) << 7;
  int32_t subnormal[16], subnormal_more[16];  // of scale bytes 0 to 7; zero takes all that there is
  int32_t more[16];                           // by the three mantissa bits: what 1.5 times adds to the bits
};
constexpr int32_t half_as_much_more(uint32_t bits) {  // of a float with at most five significant bits
  const uint32_t significand = (bits & 0x7fffff) | 0x800000, larger = significand + significand / 2;
  const uint32_t exponent = bits >> 23;
  const uint32_t result =
      larger >> 24 ? (exponent + 1) << 23 | (larger / 2 & 0x7fffff) : exponent << 23 | (larger & 0x7fffff);
  return static_cast<int32_t>(result >> 16);
}
constexpr ScaleTables scale_tables() {
  ScaleTables t{};
  for (uint32_t i = 0; i < 16; ++i) {
    const uint32_t subnormal = float_bits(kE4M3, i % 8), normal = float_bits(kE4M3, 8 + i % 8);
    t.more[i] = half_as_much_more(normal) - static_cast<int32_t>(normal >> 16);
    t.subnormal[i] = i % 8 ? static_cast<int32_t>(subnormal >> 16) : ScaleTables::kTop - 0xffff;
    t.subnormal_more[i] = i % 8 ? half_as_much_more(subnormal) : ScaleTables::kTop + 1 - 0xffff;
  }
  return t;
}
constexpr ScaleTables kScales = scale_tables();

// 4 bits, by two ways at once. Lookups of words take both ports that vectors have, shifts and saturating subtractions
// take the first, and lookups of bytes and bit fields the second. So two vectors of four come from words, and two from
// bytes: a number's bytes are looked up apart, at 16 + code and at 32 + 2 code. Such indices are fields of six bits
// that begin at the code, and a bit before it, once all codes between are 1.
template <Raise kHow>
struct BalancedFourBits {
  struct alignas(64) Bytes {
    uint8_t entry[64];
  };
  static constexpr Bytes split() {
    Bytes t{};
    for (int code = 0; code < 16; ++code) {
      const uint16_t number = FourBits<kHow>::kTable.entry[code];
      t.entry[16 + code] = static_cast<uint8_t>(number);
      t.entry[32 + 2 * code] = static_cast<uint8_t>(number >> 8);
    }
    return t;
  }
  static constexpr Bytes kBytes = split();
  __m512i table = FourBits<kHow>().table, bytes = load512(&kBytes), second = indices(4), fourth = indices(12);

  // GCC would read what it knows to lie in memory again for every use, six times for four vectors, and so keep the
  // ports busy that load tiles.
  void keep_in_registers() { __asm__("" : "+v"(table), "+v"(bytes), "+v"(second), "+v"(fourth)); }

  // Of the codes that begin at bit `at` of each word.
  static __m512i indices(int at) {
    const auto both = [at](int word) {
      const int64_t bit = 16 * word + at;
      return (bit | (bit - 1) << 8) << 16 * word;
    };
    return _mm512_set1_epi64(both(0) | both(1) | both(2) | both(3));
  }
  template <bool kSpecial, class F, class Lower = AsIs>
  MS_INLINE void pairs(const uint8_t *tile, int first, int last, F f, Lower lower = {}) const {
    // Copies: closures that hold `this` would keep the tables in memory.
    const __m512i by_word = table, by_byte = bytes, fields[2] = {second, fourth};
    const auto words_of = [lower, by_word](__m512i v) { return lower(_mm512_permutexvar_epi16(v, by_word)); };
    const auto bytes_of = [lower, by_byte](__m512i v, __m512i at) {
      return lower(_mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(at, v), by_byte));
    };
#pragma GCC unroll 4
    for (int q = first / 4; q < last / 4; ++q) {
      const __m512i v = load512(tile + 64 * q);
      const __m512i apart = _mm512_ternarylogic_epi32(v, words(0xf0f0), words(0x0101), 0xea);  // v & ... | ...
      f(4 * q, words_of(v));
      f(4 * q + 1, bytes_of(apart, fields[0]));
      f(4 * q + 2, words_of(_mm512_srli_epi16(v, 8)));
      f(4 * q + 3, bytes_of(apart, fields[1]));
    }
  }
};
template <int kFormat, Raise kHow>
struct BalancedCodes : Codes<kFormat, kHow> {
  void keep_in_registers() {}
};
template <Raise kHow>
struct BalancedCodes<MS_MXFP4, kHow> : BalancedFourBits<kHow> {};
template <Raise kHow>
struct BalancedCodes<MS_NVFP4, kHow> : BalancedFourBits<kHow> {};

template <int kFormat>
struct Decoder {
  static constexpr Raise kHow = kFormat == MS_FP8_BLOCK128 ? kAsIs : kFormat == MS_NVFP4 ? kFlagged : kRaised;
  BalancedCodes<kFormat, kHow> codes{};

  // What a tile's scales change in its numbers: of NVFP4 a half's.
  struct Change {
    __m512i power, half_more;  // half_more: NVFP4
  };
  // A quarter of a tile from its codes and scales, four vectors: other work may go between quarters. `change` is kept
  // from one to the next.
  template <int kQuarter>
  MS_INLINE void quarter(const uint8_t *from, const uint8_t *scales, Change &change, uint8_t *out) const {
    constexpr int first = 4 * kQuarter, last = first + 4;
    const auto put = [out](int pair, __m512i v) { _mm512_store_si512(out + 64 * pair, v); };
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      codes.template pairs<false>(from, first, last, put);
    } else if constexpr (kFormat == MS_NVFP4) {
      if constexpr (kQuarter % 2 == 0)
        change = lowering(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales + 8 * kQuarter)));
      codes.template pairs<false>(from, first, last, put, [&](__m512i v) {
        const auto half_more = _mm512_test_epi16_mask(v, words(1));
        return _mm512_mask_subs_epu16(_mm512_subs_epu16(v, change.power), half_more, v, change.half_more);
      });
    } else {
      if constexpr (kQuarter == 0) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales)));
        const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 16));
        const __m512i exponent = kFormat == MS_MXINT8 ? _mm512_sub_epi16(both, words(127 - Codes<kFormat>::kShift))
                                                      : _mm512_sub_epi16(words(127 + kRaise), both);
        change.power = _mm512_slli_epi16(exponent, 7);
      }
      const __m512i power = change.power;
      codes.template pairs<false>(from, first, last, put, [power](__m512i v) {
        if constexpr (kFormat == MS_MXINT8)
          return _mm512_mask_add_epi16(v, _mm512_test_epi16_mask(v, words(0x7fff)), v, power);
        else
          return _mm512_subs_epu16(v, power);
      });
    }
  }

  // What must be taken from the bits of a raised power of two, and of one that is flagged to be half as much more, for
  // its product with a positive E4M3 scale; everything where the scale is zero.
  const __m512i subnormals = load512(&kScales.subnormal), subnormals_more = load512(&kScales.subnormal_more);
  const __m512i more = load512(&kScales.more);

  Change lowering(__m128i bytes) const {
    const __m512i s = _mm512_cvtepu8_epi32(bytes);
    __m512i one = _mm512_add_epi32(_mm512_slli_epi32(s, 4), _mm512_set1_epi32((127 - 7) << 7));
    __m512i half_more = _mm512_add_epi32(one, _mm512_permutexvar_epi32(s, more));
    const auto subnormal = _mm512_cmplt_epu32_mask(s, _mm512_set1_epi32(8));
    one = _mm512_mask_permutexvar_epi32(one, subnormal, s, subnormals);
    half_more = _mm512_mask_permutexvar_epi32(half_more, subnormal, s, subnormals_more);
    one = _mm512_sub_epi32(_mm512_set1_epi32(kScales.kTop), one);
    half_more = _mm512_sub_epi32(_mm512_set1_epi32(kScales.kTop + 1), half_more);  // and the flag
    return {_mm512_or_si512(one, _mm512_slli_epi32(one, 16)),
            _mm512_or_si512(half_more, _mm512_slli_epi32(half_more, 16))};
  }
};

}  // namespace
}  // namespace microscale
