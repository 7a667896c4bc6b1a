// What one instruction set level can do at most: the two measures behind a floor. As table.h, this is included by units
// compiled for a level, which hold nothing else.
#pragma once
#include <stdint.h>

namespace microscale {

// Bytes that one call of Ceilings::read takes at the least, and a multiple of which it takes.
constexpr int64_t kReadStep = 1024;

struct Ceilings {
  // Reads `bytes` bytes, a multiple of kReadStep, at `from`, aligned to 64. The result depends on every one of them.
  uint64_t (*read)(const uint8_t *from, int64_t bytes);
  // Multiplies and adds in registers alone, `rounds` times over; adds a number that depends on it to *sink and returns
  // the FLOPs done. Operands are neither zero nor subnormal nor all alike: some processors clock higher on zeros.
  int64_t (*multiply)(int64_t rounds, float *sink);
};

extern const Ceilings plain_ceilings, avx2_ceilings, avx512_ceilings, avx512_bf16_ceilings, amx_ceilings;

namespace {

// The i-th of numbers in [0.5, 2) of either sign, bits of bfloat16. Sums of products with them stay small.
constexpr uint16_t operand_bits(uint32_t i) {
  const uint32_t mixed = (i * 2654435761u) ^ ((i * 40503u) >> 7);
  return static_cast<uint16_t>((mixed >> 31) << 15 | (126u + (mixed >> 20 & 1)) << 7 | (mixed >> 13 & 0x7f));
}

struct alignas(64) Operands {
  uint16_t bf16[512];
};
constexpr Operands operands() {
  Operands o{};
  for (uint32_t i = 0; i < 512; ++i) o.bf16[i] = operand_bits(i + 1);
  return o;
}
constexpr Operands kOperands = operands();

inline float operand(int i) {
  const uint32_t bits = static_cast<uint32_t>(kOperands.bf16[i]) << 16;
  return __builtin_bit_cast(float, bits);
}

}  // namespace
}  // namespace microscale
