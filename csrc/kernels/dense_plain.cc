// Any processor: the compiler's vectors of four.
#include "dense.h"

namespace microscale {
namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x4 __attribute__((vector_size(8)));

struct Plain {
  using Operand = float;
  using Weights = f32x4;
  using Sum = f32x4;
  static constexpr int64_t kLanes = 4;
  static constexpr int kParts = 4, kRows = 2;
  static constexpr int columns(int) { return 1; }

  static Sum zero() { return Sum{}; }
  template <int kDtype>
  static Weights weights(const uint8_t *p) {
    if constexpr (kDtype == MS_FP32) return load_lanes<f32x4>(p);
    const u32x4 bits = __builtin_convertvector(load_lanes<u16x4>(p), u32x4);
    if constexpr (kDtype == MS_BF16) return __builtin_bit_cast(f32x4, bits << 16);
    // As a float the magnitude is too small by 2^112, subnormals too.
    const u32x4 magnitude = (bits & 0x7fffu) << 13;
    const u32x4 value = __builtin_bit_cast(u32x4, __builtin_bit_cast(f32x4, magnitude) * 0x1p112f);
    const u32x4 infinite = magnitude >= (0x7c00u << 13);
    const u32x4 finished = (value & ~infinite) | ((magnitude | 0x7f800000u) & infinite);
    return __builtin_bit_cast(f32x4, finished | (bits & 0x8000u) << 16);
  }
  template <int kDtype>
  static Weights weights(const uint8_t *p, int64_t count) {
    uint8_t part[16] = {};
    __builtin_memcpy(part, p, static_cast<size_t>(count * dtype_bytes(kDtype)));
    return weights<kDtype>(part);
  }
  static f32x4 operands(const Operand *x) { return load_lanes<f32x4>(x); }
  static f32x4 operands(const Operand *x, int64_t count) {
    return weights<MS_FP32>(reinterpret_cast<const uint8_t *>(x), count);
  }
  static Sum multiply(Sum sum, Weights w, f32x4 x) { return sum + w * x; }
  static float total(const Sum (&sum)[kParts]) {
    const f32x4 all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return (all[0] + all[1]) + (all[2] + all[3]);
  }
};

}  // namespace

extern const Dense plain_dense = {
    MS_FP32,
    {dense_product<Plain, MS_BF16>, dense_product<Plain, MS_FP16>, dense_product<Plain, MS_FP32>},
};

}  // namespace microscale
