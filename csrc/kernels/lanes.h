// 16 floats at a time in the compiler's own vectors, which become whatever the unit is compiled for.
#pragma once
#include <stdint.h>

#include "inline.h"

namespace microscale {
namespace {

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

inline f32x16 splat(float v) { return v - f32x16{}; }
inline u32x16 splat(uint32_t v) { return v - u32x16{}; }
inline f32x16 as_float(u32x16 v) { return __builtin_bit_cast(f32x16, v); }
inline u32x16 as_bits(f32x16 v) { return __builtin_bit_cast(u32x16, v); }

template <class T, class S>
inline T load_lanes(const S *p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T, class S>
inline void store_lanes(S *p, T v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// The first n < 16 of them; the rest reads as zero.
template <class T, class S>
inline T load_lanes(const S *p, int64_t n) {
  T v{};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(S));
  return v;
}
template <class T, class S>
inline void store_lanes(S *p, T v, int64_t n) {
  __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(S));
}

// As many as a register holds: wider vectors GCC 12 passes through memory, and it compares them number by number.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kRegisterLanes = 8;
typedef float f32r __attribute__((vector_size(32)));
#else
constexpr int kRegisterLanes = kLanes;
typedef f32x16 f32r;
#endif

// N vectors of type T side by side: a chain of operations, each of which needs the one before, leaves most of a core
// idle, and N of them do not. One at a time where vectors are the compiler's own: which of two NaNs a sum or product
// takes its sign from would depend on how many there are.
#ifdef __AVX2__
constexpr int kSideBySide = 4;
#else
constexpr int kSideBySide = 1;
#endif
template <class T, int N>
struct Several {
  T v[N];

  Several() = default;
  MS_INLINE Several(float all) {  // implicit, as of the compiler's vectors
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) v[i] = all - T{};
  }
  // f of each of them, and of what stands at its place in `more`.
  template <class F, class... More>
  MS_INLINE Several each(F f, const More &...more) const {
    Several r;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) r.v[i] = f(v[i], more.v[i]...);
    return r;
  }
  friend MS_INLINE Several operator-(const Several &a) {
    return a.each([](T x) { return -x; });
  }
  friend MS_INLINE Several operator+(const Several &a, const Several &b) {
    return a.each([](T x, T y) { return x + y; }, b);
  }
  friend MS_INLINE Several operator-(const Several &a, const Several &b) {
    return a.each([](T x, T y) { return x - y; }, b);
  }
  friend MS_INLINE Several operator*(const Several &a, const Several &b) {
    return a.each([](T x, T y) { return x * y; }, b);
  }
  friend MS_INLINE Several operator/(const Several &a, const Several &b) {
    return a.each([](T x, T y) { return x / y; }, b);
  }
};

inline f32x16 from_bf16(u16x16 v) { return as_float(__builtin_convertvector(v, u32x16) << 16); }

// To nearest, ties to even; a NaN stays one.
inline u16x16 to_bf16(f32x16 v) {
  const u32x16 bits = as_bits(v);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32x16 nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > splat(0x7f800000u) ? nan : rounded, u16x16);
}

inline f32x16 from_fp16(u16x16 v) {
  const u32x16 bits = __builtin_convertvector(v, u32x16);
  const u32x16 magnitude = (bits & 0x7fffu) << 13;
  // As a float the magnitude is too small by 2^112, subnormals too.
  u32x16 value = as_bits(as_float(magnitude) * splat(0x1p112f));
  value = magnitude >= splat(0x7c00u << 13) ? (magnitude | 0x7f800000u) : value;
  return as_float(value | (bits & 0x8000u) << 16);
}

inline u16x16 to_fp16(f32x16 v) {
  const u32x16 bits = as_bits(v);
  const u32x16 magnitude = bits & 0x7fffffffu;
  // Subnormal results: the addition of 2^-1 leaves the rounded multiple of 2^-24 in the low bits.
  const u32x16 small = as_bits(as_float(magnitude) + splat(0.5f)) - 0x3f000000u;
  const u32x16 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  u32x16 r = magnitude < splat(113u << 23) ? small : normal;
  r = magnitude >= splat(0x477ff000u) ? splat(0x7c00u) : r;  // 65520 and above
  r = magnitude > splat(0x7f800000u) ? splat(0x7e00u) : r;
  return __builtin_convertvector(r | (bits >> 16 & 0x8000u), u16x16);
}

}  // namespace
}  // namespace microscale
