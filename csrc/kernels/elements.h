// Values of codes as bfloat16 bits, made at compile time from each encoding's definition (OCP MX v1.0, OFP8).
#pragma once
#include <stdint.h>

namespace microscale {
namespace {

// Bits of a bfloat16 or a float16 for sign, exponent and mantissa fields of a small float; subnormals are normalised.
struct Encoding {
  int exponent_bits, mantissa_bits, bias;
};
constexpr Encoding kE2M1{2, 1, 1}, kE2M3{2, 3, 1}, kE3M2{3, 2, 3}, kE4M3{4, 3, 7}, kE5M2{5, 2, 15};

constexpr uint32_t float_bits(Encoding e, uint32_t code) {
  const uint32_t sign = (code >> (e.exponent_bits + e.mantissa_bits)) & 1;
  uint32_t field = (code >> e.mantissa_bits) & ((1u << e.exponent_bits) - 1);
  uint32_t mantissa = code & ((1u << e.mantissa_bits) - 1);
  if (field == 0 && mantissa == 0) return sign << 31;
  int exponent = static_cast<int>(field) - e.bias;
  if (field == 0) {
    exponent = 1 - e.bias;
    while (!(mantissa >> e.mantissa_bits)) {
      mantissa <<= 1;
      --exponent;
    }
    mantissa &= (1u << e.mantissa_bits) - 1;
  }
  return sign << 31 | static_cast<uint32_t>(exponent + 127) << 23 | mantissa << (23 - e.mantissa_bits);
}

constexpr uint16_t bf16_bits(Encoding e, uint32_t code) { return static_cast<uint16_t>(float_bits(e, code) >> 16); }

constexpr float power_of_two(int exponent) {
  float v = 1;
  for (; exponent > 0; --exponent) v *= 2;
  for (; exponent < 0; ++exponent) v /= 2;
  return v;
}

// Entry i is the value of code i % codes.
template <int N>
struct alignas(64) Table16 {
  uint16_t entry[N];
};
template <int N>
constexpr Table16<N> bf16_table(Encoding e, int codes) {
  Table16<N> t{};
  for (int i = 0; i < N; ++i) t.entry[i] = bf16_bits(e, static_cast<uint32_t>(i % codes));
  return t;
}

// Values times 2^kRaise, so large that an unsigned, saturating subtraction from their bits can scale them down again
// and leaves zero, of either sign, alone. `flag`: bit 0 is set where the mantissa is not zero.
constexpr int kRaise = 100;
template <int N>
constexpr Table16<N> raised_table(Encoding e, int codes, bool flag) {
  Table16<N> t = bf16_table<N>(e, codes);
  for (int i = 0; i < N; ++i) {
    uint16_t &v = t.entry[i];
    if ((v & 0x7fff) == 0)
      v = 0;
    else if (!flag)
      v = static_cast<uint16_t>(v + (kRaise << 7));
    else
      v = static_cast<uint16_t>((v & 0xff80) + (kRaise << 7) + ((v & 0x7f) != 0));
  }
  return t;
}

}  // namespace
}  // namespace microscale
