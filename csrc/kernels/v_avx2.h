// AVX2 vectors and decoders for gemm.h. A word of a tile holds codes of one column for both parities of k, so
// neighbouring lanes hold even and odd k of one column: rows are read two floats at a time, and the lanes are added in
// pairs at a block's end.
#pragma once
#include <immintrin.h>

#include "../layout.h"
#include "elements.h"

namespace microscale {
namespace {

struct Avx2 {
  using Operand = float;
  // 16 columns x 2 k. FourBits fills them in another order of columns than Halves; each undoes its own.
  struct Weights {
    __m256 part[4];
  };
  struct Sum {
    __m256 part[4];
  };
  struct Total {
    __m256 half[2];  // columns 0 to 7, 8 to 15
  };
  static constexpr int kStep = 2, kDirect = 2, kRows = 3, kPanels = 1, kSinglePanels = 1;
  static constexpr int64_t kAhead = 1, kScratch = 16 << 10;

  static Sum no_sum() {
    const __m256 zero = _mm256_setzero_ps();
    return {{zero, zero, zero, zero}};
  }
  static Total no_total() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Total load(const float *p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static void store(float *p, const Total &t) {
    _mm256_storeu_ps(p, t.half[0]);
    _mm256_storeu_ps(p + 8, t.half[1]);
  }
  static void prefetch(const uint8_t *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char *>(p + i), _MM_HINT_T0);
  }
  static void multiply(Sum &sum, const Weights &w, const Operand *x) {
    double both;
    __builtin_memcpy(&both, x, 8);
    const __m256 pair = _mm256_castpd_ps(_mm256_set1_pd(both));
    for (int i = 0; i < 4; ++i) sum.part[i] = _mm256_fmadd_ps(w.part[i], pair, sum.part[i]);
  }
  template <class D, bool kSpecial>
  static void add_block(Total &total, const Sum &sum, const Total &scale) {
    for (int i = 0; i < 2; ++i) {
      __m256 s = D::columns(sum.part[2 * i], sum.part[2 * i + 1]);
      if constexpr (kSpecial && D::kShift != 0) s = _mm256_mul_ps(s, _mm256_set1_ps(power_of_two(D::kShift)));
      total.half[i] = _mm256_fmadd_ps(s, scale.half[i], total.half[i]);
    }
  }
};

inline __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// The high and the low byte of each E2M1 value as bfloat16, for byte shuffles.
struct alignas(16) ByteTables {
  uint8_t high[16], low[16];
};
constexpr ByteTables byte_tables() {
  ByteTables t{};
  for (uint32_t code = 0; code < 16; ++code) {
    t.high[code] = static_cast<uint8_t>(bf16_bits(kE2M1, code) >> 8);
    t.low[code] = static_cast<uint8_t>(bf16_bits(kE2M1, code));
  }
  return t;
}

// 4 bits: two byte lookups make bfloat16 numbers, of which even and odd ones become floats.
struct FourBits {
  static constexpr ByteTables kTables = byte_tables();
  const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(kTables.high)));
  const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(kTables.low)));

  // Of four pairs the second and the third change places.
  static constexpr int order(int i) { return i % 4 == 1 || i % 4 == 2 ? i ^ 3 : i; }
  // Lanes: columns 0 0 1 1 4 4 5 5 and 2 2 3 3 6 6 7 7.
  static __m256 columns(__m256 a, __m256 b) { return _mm256_hadd_ps(a, b); }

  template <bool kSpecial, class Emit>
  void pairs(const uint8_t *tile, int first, int last, Emit emit) const {
    const __m256i nibble = _mm256_set1_epi8(15), odd = _mm256_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 4
    for (int q = first / 4; q < last / 4; ++q) {
      const __m256i v[2] = {load256(tile + 64 * q), load256(tile + 64 * q + 32)};
      for (int n = 0; n < 2; ++n) {  // low nibbles are pairs 4 q and 4 q + 2, high ones those behind them
        __m256i lower[2], upper[2];  // bfloat16: even k in the low half of each dword, odd k in the high one
        for (int half = 0; half < 2; ++half) {
          const __m256i index = _mm256_and_si256(n ? _mm256_srli_epi16(v[half], 4) : v[half], nibble);
          const __m256i h = _mm256_shuffle_epi8(high, index), l = _mm256_shuffle_epi8(low, index);
          lower[half] = _mm256_unpacklo_epi8(l, h);
          upper[half] = _mm256_unpackhi_epi8(l, h);
        }
        const auto even_of = [](__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); };
        const auto odd_of = [&](__m256i w) { return _mm256_castsi256_ps(_mm256_and_si256(w, odd)); };
        emit(4 * q + n, {{even_of(lower[0]), even_of(upper[0]), even_of(lower[1]), even_of(upper[1])}});
        emit(4 * q + n + 2, {{odd_of(lower[0]), odd_of(upper[0]), odd_of(lower[1]), odd_of(upper[1])}});
      }
    }
  }
};

// Other formats go through float16, whose conversion normalises subnormals; what is missing in the exponent is kShift.
struct Halves {
  static constexpr int order(int i) { return i; }
  // Lanes: columns 0 0 1 1 2 2 3 3 and 4 4 5 5 6 6 7 7.
  static __m256 columns(__m256 a, __m256 b) {
    const __m256 mixed = _mm256_hadd_ps(a, b);  // 0 1 4 5 2 3 6 7
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
  }
  static Avx2::Weights floats(__m256i first, __m256i second) {
    return {{_mm256_cvtph_ps(_mm256_castsi256_si128(first)), _mm256_cvtph_ps(_mm256_extracti128_si256(first, 1)),
             _mm256_cvtph_ps(_mm256_castsi256_si128(second)), _mm256_cvtph_ps(_mm256_extracti128_si256(second, 1))}};
  }
};

template <Encoding kEncoding>
struct SixBits : Halves {
  template <bool kSpecial, class Emit>
  void pairs(const uint8_t *tile, int first, int last, Emit emit) const {
    const __m256i magnitude = _mm256_set1_epi16(31), sign = _mm256_set1_epi16(32);
    const __m256i four = _mm256_set1_epi16(15), two = _mm256_set1_epi16(48);
    for (int pair = first; pair < last; ++pair) {
      __m256i half[2];
      for (int i = 0; i < 2; ++i) {
        const __m256i lows = load256(tile + 64 * (pair / 4) + 32 * i),
                      highs = load256(tile + 256 + 64 * (pair / 8) + 32 * i);
        const __m256i low = _mm256_and_si256(_mm256_srl_epi16(lows, _mm_cvtsi32_si128(4 * (pair % 4))), four);
        const __m256i high = _mm256_slli_epi16(_mm256_srl_epi16(highs, _mm_cvtsi32_si128(2 * (pair % 8))), 4);
        const __m256i code = _mm256_or_si256(low, _mm256_and_si256(high, two));
        half[i] = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(code, sign), 10),
                                  _mm256_slli_epi16(_mm256_and_si256(code, magnitude), 10 - kEncoding.mantissa_bits));
      }
      emit(pair, floats(half[0], half[1]));
    }
  }
};

template <Encoding kEncoding>
struct EightBits : Halves {
  template <bool kSpecial>
  static __m256i value(__m256i v) {  // words with a code in their high byte and zeros below
    if constexpr (kEncoding.exponent_bits == 5) return v;
    const __m256i magnitude = _mm256_set1_epi16(0x7f00);
    const __m256i low = _mm256_and_si256(v, magnitude);
    __m256i r = _mm256_or_si256(_mm256_andnot_si256(magnitude, v), _mm256_srli_epi16(low, 1));
    if constexpr (kSpecial)
      r = _mm256_or_si256(r, _mm256_and_si256(_mm256_cmpeq_epi16(low, magnitude), _mm256_set1_epi16(0x7e00)));
    return r;
  }
  template <bool kSpecial, class Emit>
  void pairs(const uint8_t *tile, int first, int last, Emit emit) const {
    const __m256i high = _mm256_set1_epi16(-0x100);
#pragma GCC unroll 8
    for (int q = first / 2; q < last / 2; ++q) {
      const __m256i v = load256(tile + 64 * q), w = load256(tile + 64 * q + 32);
      emit(2 * q, floats(value<kSpecial>(_mm256_slli_epi16(v, 8)), value<kSpecial>(_mm256_slli_epi16(w, 8))));
      emit(2 * q + 1, floats(value<kSpecial>(_mm256_and_si256(v, high)), value<kSpecial>(_mm256_and_si256(w, high))));
    }
  }
};

struct Integers : Halves {
  static __m256 value(__m128i words) { return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words)); }
  template <bool kSpecial, class Emit>
  void pairs(const uint8_t *tile, int first, int last, Emit emit) const {
#pragma GCC unroll 8
    for (int q = first / 2; q < last / 2; ++q)
      for (int j = 0; j < 2; ++j) {
        Avx2::Weights w;
        for (int i = 0; i < 2; ++i) {
          const __m256i v = load256(tile + 64 * q + 32 * i);
          const __m256i words = _mm256_srai_epi16(j ? v : _mm256_slli_epi16(v, 8), 8);
          w.part[2 * i] = value(_mm256_castsi256_si128(words));
          w.part[2 * i + 1] = value(_mm256_extracti128_si256(words, 1));
        }
        emit(2 * q + j, w);
      }
  }
};

template <int kFormat>
struct Codes;
template <>
struct Codes<MS_MXFP4> : FourBits {
  static constexpr int kShift = 0;
};
template <>
struct Codes<MS_NVFP4> : FourBits {
  static constexpr int kShift = 0;
};
template <>
struct Codes<MS_MXFP6_E2M3> : SixBits<kE2M3> {
  static constexpr int kShift = 14;
};
template <>
struct Codes<MS_MXFP6_E3M2> : SixBits<kE3M2> {
  static constexpr int kShift = 12;
};
template <>
struct Codes<MS_MXFP8_E4M3> : EightBits<kE4M3> {
  static constexpr int kShift = 8;
};
template <>
struct Codes<MS_MXFP8_E5M2> : EightBits<kE5M2> {
  static constexpr int kShift = 0;
};
template <>
struct Codes<MS_FP8_BLOCK128> : EightBits<kE4M3> {
  static constexpr int kShift = 8;
};
template <>
struct Codes<MS_MXINT8> : Integers {
  static constexpr int kShift = -6;
};

template <int kFormat_>
struct Decoder256 {
  static constexpr int kFormat = kFormat_;
  static constexpr int kShift = Codes<kFormat>::kShift;
  static constexpr int64_t kTileBytes = tile_bytes(kFormat);
  static constexpr int kBlocks = kFormat == MS_NVFP4 ? 2 : 1;
  const Codes<kFormat> codes;

  static __m256 columns(__m256 a, __m256 b) { return Codes<kFormat>::columns(a, b); }

  static constexpr int kParts = traits(kFormat).bits == 8 ? 8 : 4;

  static constexpr int order(int i) { return Codes<kFormat>::order(i); }
  template <bool kSpecial, class Emit>
  void steps(const uint8_t *tile, int part, Emit emit) const {
    constexpr int kPairs = 16 / kParts;
    codes.template pairs<kSpecial>(tile, part * kPairs, part * kPairs + kPairs, emit);
  }

  // Scales of 8 columns, times 2^kShift unless special.
  template <bool kSpecial>
  static __m256 eight(const uint8_t *bytes) {
    const __m256i s = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes)));
    if constexpr (kFormat == MS_NVFP4) {
      const __m256i seven = _mm256_set1_epi32(0x7f), magnitude = _mm256_and_si256(s, seven);
      const __m256i words = _mm256_packus_epi32(_mm256_slli_epi32(magnitude, 7), _mm256_setzero_si256());
      const __m128i halves = _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0xd8));
      __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0f));
      value = _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_andnot_si256(seven, s), 24)));
      if constexpr (kSpecial)
        value = _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpeq_epi32(magnitude, seven),
                                                                         _mm256_set1_epi32(0x7fc00000))));
      return value;
    } else {
      __m256i e = s;
      if (!kSpecial && kShift != 0)  // far from 1 only where all codes are zero: anything finite will do
        e = _mm256_min_epu32(_mm256_max_epu32(e, _mm256_set1_epi32(32)), _mm256_set1_epi32(222));
      __m256i bits = _mm256_slli_epi32(e, 23);
      if (!kSpecial && kShift != 0) bits = _mm256_add_epi32(bits, _mm256_set1_epi32(kShift * (1 << 23)));
      if (kSpecial) {
        bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000), _mm256_cmpeq_epi32(s, _mm256_setzero_si256()));
        bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), _mm256_cmpeq_epi32(s, _mm256_set1_epi32(255)));
      }
      return _mm256_castsi256_ps(bits);
    }
  }
  // `scales` are the tile's (block FP8: the panel's).
  template <bool kSpecial>
  static Avx2::Total scale(const uint8_t *scales, int64_t tile, int block) {
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      __m256 s = _mm256_broadcast_ss(reinterpret_cast<const float *>(scales) + tile / 4);
      if (!kSpecial) s = _mm256_mul_ps(s, _mm256_set1_ps(power_of_two(kShift)));
      return {{s, s}};
    } else {
      const uint8_t *p = scales + 16 * block;
      return {{eight<kSpecial>(p), eight<kSpecial>(p + 8)}};
    }
  }
};

}  // namespace
}  // namespace microscale
