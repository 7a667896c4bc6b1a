// AVX2 vectors and decoders for gemm.h. A word of a tile holds codes of one column for both parities of k, so
// neighbouring lanes hold even and odd k of one column: rows are read two floats at a time, and the lanes are added in
// pairs at the very end.
#pragma once
#include <immintrin.h>

#include "../layout.h"
#include "elements.h"

namespace microscale {
namespace {

struct Avx2 {
  using Operand = float;
  // 8 columns x 2 k: two lanes for each column, in the decoder's order of columns.
  struct Weights {
    __m256 part[2];
  };
  using Sum = Weights;
  using Scale = Weights;
  using Total = Weights;
  static constexpr int kStep = 2, kUnits = 2, kRows = 4, kStagedRows = 6, kBlockRows = 24;
  static constexpr int64_t kScratch = 0;
  static constexpr int few(int blocks, int bits) { return blocks == 1 && bits == 4 ? 12 : 4; }
  static constexpr int at_once(int rows, int blocks, int) { return rows == 1 ? 4 : rows == 2 && blocks == 1 ? 2 : 1; }

  static Sum no_sum() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Total no_total() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  template <class D>
  static void store(float *p, const Total &t) {
    _mm256_storeu_ps(p, D::columns(t.part[0], t.part[1]));
  }
  static void multiply(Sum &sum, const Weights &w, const Operand *x) {
    double both;
    __builtin_memcpy(&both, x, 8);
    const __m256 pair = _mm256_castpd_ps(_mm256_set1_pd(both));
    for (int i = 0; i < 2; ++i) sum.part[i] = _mm256_fmadd_ps(w.part[i], pair, sum.part[i]);
  }
  template <class D, bool kSpecial>
  static void add_block(Total &total, const Sum &sum, const Scale &scale) {
    for (int i = 0; i < 2; ++i) {
      __m256 s = sum.part[i];
      if constexpr (kSpecial && D::kShift != 0) s = _mm256_mul_ps(s, _mm256_set1_ps(power_of_two(D::kShift)));
      total.part[i] = _mm256_fmadd_ps(s, scale.part[i], total.part[i]);
    }
  }
};

inline __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// Controls of a byte shuffle on 8 bytes repeated through both halves of a register: the column of every lane.
struct alignas(32) LaneBytes {
  int8_t dword[2][32];  // a column's byte in the top of each of its lanes of 32 bits, zeros below
  int8_t word[32];      // a column's byte in the top of each of its lanes of 16 bits: those of part 0, then of part 1
};
template <class Order>
constexpr LaneBytes lane_bytes() {
  LaneBytes t{};
  for (int part = 0; part < 2; ++part)
    for (int lane = 0; lane < 8; ++lane) {
      for (int byte = 0; byte < 3; ++byte) t.dword[part][4 * lane + byte] = -1;
      t.dword[part][4 * lane + 3] = static_cast<int8_t>(Order::column(part, lane / 2));
      t.word[16 * part + 2 * lane] = -1;
      t.word[16 * part + 2 * lane + 1] = static_cast<int8_t>(Order::column(part, lane / 2));
    }
  return t;
}

// Each E2M1 value's high and low byte as bfloat16, times a power of two, for byte shuffles.
struct alignas(16) ByteTables {
  uint8_t high[16], low[16];
};
constexpr ByteTables byte_tables(uint32_t exponent) {
  ByteTables t{};
  for (uint32_t code = 0; code < 16; ++code) {
    uint32_t bits = bf16_bits(kE2M1, code);
    if (bits & 0x7fff) bits += exponent << 7;
    t.high[code] = static_cast<uint8_t>(bits >> 8);
    t.low[code] = static_cast<uint8_t>(bits);
  }
  return t;
}

// Low and high bytes of bfloat16 numbers, of which even and odd ones become floats.
struct Bytes {
  // Columns 0 0 1 1 4 4 5 5 and 2 2 3 3 6 6 7 7.
  static constexpr int column(int part, int i) { return 2 * part + i % 2 + i / 2 * 4; }
  static __m256 columns(__m256 a, __m256 b) { return _mm256_hadd_ps(a, b); }

  // `first` and `second`: the pairs in the even and odd bytes.
  template <class Emit>
  static void emit_bytes(int first, int second, __m256i l, __m256i h, Emit emit) {
    const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    const auto even_of = [](__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); };
    const auto odd_of = [&](__m256i w) { return _mm256_castsi256_ps(_mm256_and_si256(w, odd)); };
    // Even k in the low half of each dword, odd k in the high one.
    const __m256i lower = _mm256_unpacklo_epi8(l, h), upper = _mm256_unpackhi_epi8(l, h);
    emit(first, {{even_of(lower), even_of(upper)}});
    emit(second, {{odd_of(lower), odd_of(upper)}});
  }
};

// 4 bits: two byte lookups.
template <uint32_t kExponent>
struct FourBits : Bytes {
  static constexpr int kParts = 8;
  static constexpr ByteTables kTables = byte_tables(kExponent);
  const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(kTables.high)));
  const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(kTables.low)));

  static constexpr int order(int i) { return i % 4 == 1 ? i + 1 : i % 4 == 2 ? i - 1 : i; }

  template <bool kSpecial, class Emit>
  void steps(const uint8_t *codes, int part, Emit emit) const {
    const __m256i nibble = _mm256_set1_epi8(15);
    const int q = part / 2, n = part % 2;  // low nibbles are pairs 4 q and 4 q + 2, high ones those behind them
    const __m256i v = load256(codes + 64 * q);
    const __m256i index = _mm256_and_si256(n ? _mm256_srli_epi16(v, 4) : v, nibble);
    emit_bytes(4 * q + n, 4 * q + n + 2, _mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index), emit);
  }
};

// Other formats go through float16, whose conversion normalises subnormals; what is missing in the exponent is kShift.
struct Halves {
  static constexpr int kParts = 8;
  static constexpr int order(int i) { return i; }
  // Columns 0 0 1 1 2 2 3 3 and 4 4 5 5 6 6 7 7.
  static constexpr int column(int part, int i) { return 4 * part + i; }
  static __m256 columns(__m256 a, __m256 b) {
    const __m256 mixed = _mm256_hadd_ps(a, b);  // 0 1 4 5 2 3 6 7
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
  }
  static Avx2::Weights floats(__m256i v) {
    return {{_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))}};
  }
};

// E2M3 magnitudes as bfloat16, a byte of it at a time. Those of 2 and more are 0x4000 and the four low bits, shifted;
// smaller ones differ from that.
struct alignas(16) Differences {
  uint8_t high[16], low[16];
};
constexpr Differences differences() {
  Differences t{};
  for (uint32_t n = 0; n < 16; ++n) {
    const uint32_t bits = bf16_bits(kE2M3, n) ^ n << 4;
    t.high[n] = static_cast<uint8_t>(bits >> 8);
    t.low[n] = static_cast<uint8_t>(bits);
  }
  return t;
}

// E2M3: a byte shuffle makes zero where its control's top bit is set, and so leaves the large ones alone. As the words
// of high bits hold pairs q and q + 4 at the same place of their bytes, those are decoded together.
struct E2M3 : Bytes {
  static constexpr int kParts = 4;
  static constexpr Differences kDiffer = differences();
  const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(kDiffer.high)));
  const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(kDiffer.low)));

  static constexpr int order(int i) { return i / 2 + i % 2 * 4; }

  template <bool kSpecial, class Emit>
  void steps(const uint8_t *codes, int part, Emit emit) const {
    const __m256i nibble = _mm256_set1_epi8(15), two = _mm256_set1_epi8(static_cast<char>(0xc0));
    const __m256i upper = _mm256_set1_epi16(static_cast<short>(0xff00));
    const int eight = part / 2, second = part % 2;
    const __m256i a = load256(codes + 128 * eight), b = load256(codes + 128 * eight + 64);
    const __m256i highs = load256(codes + 256 + 64 * eight);
    const __m256i v = second ? _mm256_blendv_epi8(_mm256_srli_epi16(a, 8), b, upper)
                             : _mm256_blendv_epi8(a, _mm256_slli_epi16(b, 8), upper);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int q = 2 * second + j;
      const __m256i n = _mm256_and_si256(j ? _mm256_srli_epi16(v, 4) : v, nibble);
      const __m256i top = _mm256_and_si256(q < 3 ? _mm256_slli_epi16(highs, 6 - 2 * q) : highs, two);
      const __m256i index = _mm256_or_si256(n, _mm256_add_epi8(top, top));
      const __m256i l = _mm256_xor_si256(_mm256_shuffle_epi8(low, index), _mm256_slli_epi16(n, 4));
      const __m256i h = _mm256_or_si256(_mm256_shuffle_epi8(high, index), top);
      emit_bytes(8 * eight + q, 8 * eight + q + 4, l, h, emit);
    }
  }
};

// E3M2: the four low bits and the two high ones of a code are shifted to where float16 has them. The arithmetic
// shift takes the sign and the highest bit of the exponent apart.
struct E3M2 : Halves {
  static __m256i shifted(__m256i v, int left) {
    return left > 0 ? _mm256_slli_epi16(v, left) : left < 0 ? _mm256_srli_epi16(v, -left) : v;
  }
  template <bool kSpecial, class Emit>
  void steps(const uint8_t *codes, int part, Emit emit) const {
    constexpr int kPlace = 10 - kE3M2.mantissa_bits;  // of the lowest bit
    const __m256i four = _mm256_set1_epi16(15 << kPlace);
    const __m256i two = _mm256_set1_epi16(static_cast<short>(0x8000 | 16 << kPlace));
#pragma GCC unroll 2
    for (int pair = 2 * part; pair < 2 * part + 2; ++pair) {
      const __m256i lows = load256(codes + 64 * (pair / 4)), highs = load256(codes + 256 + 64 * (pair / 8));
      const __m256i low = _mm256_and_si256(shifted(lows, kPlace - 4 * (pair % 4)), four);
      const __m256i top = shifted(highs, 14 - 2 * (pair % 8));
      const __m256i high = _mm256_and_si256(_mm256_srai_epi16(top, 10 - kPlace), two);
      emit(pair, floats(_mm256_or_si256(low, high)));
    }
  }
};

template <Encoding kEncoding>
struct EightBits : Halves {
  template <bool kSpecial>
  static __m256i value(__m256i v) {  // words with a code in their high byte
    constexpr int kPlace = 5 - kEncoding.exponent_bits;
    const __m256i bits = _mm256_set1_epi16(static_cast<short>(0x8000 | 0x7f00 >> kPlace));
    const __m256i r = _mm256_and_si256(kPlace ? _mm256_srai_epi16(v, kPlace) : v, bits);
    if constexpr (kEncoding.exponent_bits == 5 || !kSpecial) return r;
    const __m256i magnitude = _mm256_set1_epi16(0x7f00);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(v, magnitude), magnitude);
    return _mm256_or_si256(r, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
  }
  template <bool kSpecial, class Emit>
  void steps(const uint8_t *codes, int part, Emit emit) const {
    const __m256i v = load256(codes + 64 * part);
    emit(2 * part, floats(value<kSpecial>(_mm256_slli_epi16(v, 8))));
    emit(2 * part + 1, floats(value<kSpecial>(v)));
  }
};

struct Integers : Halves {
  static __m256 value(__m128i words) { return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words)); }
  template <bool kSpecial, class Emit>
  void steps(const uint8_t *codes, int part, Emit emit) const {
    const __m256i v = load256(codes + 64 * part);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256i words = _mm256_srai_epi16(j ? v : _mm256_slli_epi16(v, 8), 8);
      emit(2 * part + j, {{value(_mm256_castsi256_si128(words)), value(_mm256_extracti128_si256(words, 1))}});
    }
  }
};

template <int kFormat>
struct Codes;
template <>
struct Codes<MS_MXFP4> : FourBits<0> {
  static constexpr int kShift = 0;
};
template <>
struct Codes<MS_NVFP4> : FourBits<8> {  // its scales come as float16 numbers that are too small by 2^8
  static constexpr int kShift = 0;
};
template <>
struct Codes<MS_MXFP6_E2M3> : E2M3 {
  static constexpr int kShift = 0;
};
template <>
struct Codes<MS_MXFP6_E3M2> : E3M2 {
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
  // From a panel's columns 0 to 7 to the others.
  static constexpr int64_t kUnitCodes = 32, kUnitScales = kFormat == MS_FP8_BLOCK128 ? 0 : 8;
  static constexpr LaneBytes kLanes = lane_bytes<Codes<kFormat>>();
  const Codes<kFormat> codes;

  static __m256 columns(__m256 a, __m256 b) { return Codes<kFormat>::columns(a, b); }
  static constexpr int order(int i) { return Codes<kFormat>::order(i); }
  static constexpr int kParts = Codes<kFormat>::kParts;

  template <bool kSpecial, class Emit>
  void steps(const uint8_t *unit, int part, Emit emit) const {
    codes.template steps<kSpecial>(unit, part, emit);
  }

  // A power of two for each lane, times 2^kShift unless special.
  template <bool kSpecial>
  static __m256 power(__m256i bytes, int part) {
    const __m256i e = _mm256_shuffle_epi8(bytes, load256(kLanes.dword[part]));
    __m256i bits = _mm256_srli_epi32(e, 1);
    if constexpr (!kSpecial && kShift != 0) bits = _mm256_add_epi32(bits, _mm256_set1_epi32(kShift * (1 << 23)));
    if constexpr (kSpecial) {
      const __m256i nan = _mm256_cmpeq_epi32(e, _mm256_set1_epi32(static_cast<int>(0xff000000)));
      bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000), _mm256_cmpeq_epi32(e, _mm256_setzero_si256()));
      bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), nan);
    }
    return _mm256_castsi256_ps(bits);
  }
  // `scales` are the tile's (block FP8: the panel's), from the unit's first column on.
  template <bool kSpecial>
  static Avx2::Scale scale(const uint8_t *scales, int64_t tile, int block) {
    if constexpr (kFormat == MS_FP8_BLOCK128) {
      __m256 s = _mm256_broadcast_ss(reinterpret_cast<const float *>(scales) + tile / 4);
      if (!kSpecial) s = _mm256_mul_ps(s, _mm256_set1_ps(power_of_two(kShift)));
      return {{s, s}};
    } else {
      int64_t eight;
      __builtin_memcpy(&eight, scales + 16 * block, 8);
      __m256i bytes = _mm256_set1_epi64x(eight);
      if constexpr (kFormat == MS_NVFP4) {
        const __m256i v = _mm256_shuffle_epi8(bytes, load256(kLanes.word));
        return Halves::floats(EightBits<kE4M3>::value<kSpecial>(v));
      } else {
        if constexpr (!kSpecial && kShift != 0)  // far from 1 only where all codes are zero: anything finite will do
          bytes =
              _mm256_min_epu8(_mm256_max_epu8(bytes, _mm256_set1_epi8(32)), _mm256_set1_epi8(static_cast<char>(222)));
        return {{power<kSpecial>(bytes, 0), power<kSpecial>(bytes, 1)}};
      }
    }
  }
};

}  // namespace
}  // namespace microscale
