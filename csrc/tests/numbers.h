// Random numbers of any dtype at addresses that nothing aligns, and what rounding to a dtype may lose.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "microscale.h"

namespace {

std::mt19937 generator(7);

// Numbers with at most eight significant bits: the same in every dtype.
float number() { return (static_cast<float>(generator() % 255) - 127.0f) / 64; }

uint16_t half_of(float v, int dtype) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (dtype == MS_BF16) return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
  if ((bits & 0x7fffffff) == 0) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | static_cast<uint32_t>(exponent + 15) << 10 |
                               (bits >> 13 & 0x3ff));
}

float float_of(uint16_t half, int dtype) {
  if (dtype == MS_FP16) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float value = exponent ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                                 : std::ldexp(static_cast<float>(mantissa), -24);
    if (exponent == 31) return mantissa ? std::nanf("") : std::numeric_limits<float>::infinity();
    return half & 0x8000 ? -value : value;
  }
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// `count` numbers of a dtype in exactly as many bytes, `offset` bytes into an allocation of their own.
struct Numbers {
  Numbers(int64_t count, int dtype_, int64_t offset = 1)
      : dtype(dtype_), size(dtype_ == MS_FP32 ? 4 : 2), bytes(static_cast<size_t>(offset + count * size)) {
    data = bytes.data() + offset;
    for (int64_t i = 0; i < count; ++i) set(i, number());
  }
  Numbers(const Numbers &from)
      : dtype(from.dtype), size(from.size), bytes(from.bytes), data(bytes.data() + (from.data - from.bytes.data())) {}
  Numbers &operator=(const Numbers &) = delete;
  void set(int64_t i, float v) {
    const uint16_t half = half_of(v, dtype);
    std::memcpy(data + i * size, size == 4 ? static_cast<const void *>(&v) : &half, static_cast<size_t>(size));
  }
  double at(int64_t i) const {
    float v;
    uint16_t half;
    std::memcpy(size == 4 ? static_cast<void *>(&v) : &half, data + i * size, static_cast<size_t>(size));
    return double(size == 4 ? v : float_of(half, dtype));
  }
  void poison() { std::memset(bytes.data(), 0xff, bytes.size()); }  // NaN in every dtype

  int dtype;
  int64_t size;
  std::vector<uint8_t> bytes;
  uint8_t *data;
};

double rounding(int dtype) { return std::ldexp(1.01, dtype == MS_BF16 ? -8 : dtype == MS_FP16 ? -11 : -24); }

// Half the distance between subnormal numbers.
double least(int dtype) { return dtype == MS_FP16 ? std::ldexp(1.0, -25) : std::ldexp(1.0, -134); }

double rounded(int dtype, double v) { return rounding(dtype) * std::abs(v) + least(dtype); }

}  // namespace
