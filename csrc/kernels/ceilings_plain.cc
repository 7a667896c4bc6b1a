// Any processor: the compiler's vectors, multiplication and addition apart where there is no instruction for both.
#include "ceilings.h"

namespace microscale {
namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));

uint64_t read(const uint8_t *from, int64_t bytes) {
  u64x2 seen[8] = {};
  for (int64_t i = 0; i < bytes; i += 128) {
    __builtin_prefetch(from + i + 1024);
    __builtin_prefetch(from + i + 1088);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      u64x2 v;
      __builtin_memcpy(&v, from + i + 16 * j, sizeof v);
      seen[j] ^= v;
    }
  }
  u64x2 all{};
  for (const u64x2 &v : seen) all ^= v;
  return all[0] ^ all[1];
}

// s = s * a + b, which no compiler can take out of the loop; |a| < 1, so s goes to b / (1 - a).
int64_t multiply(int64_t rounds, float *sink) {
  constexpr int kSums = 12;
  f32x4 a, b, s[kSums];
  for (int i = 0; i < 4; ++i) a[i] = operand(i) * 0.49f, b[i] = operand(4 + i);
  for (int j = 0; j < kSums; ++j)
    for (int i = 0; i < 4; ++i) s[j][i] = operand(8 + 4 * j + i);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) s[j] = s[j] * a + b;
  }
  for (const f32x4 &v : s) *sink += v[0] + v[1] + v[2] + v[3];
  return rounds * kSums * 4 * 2;
}

}  // namespace

extern const Ceilings plain_ceilings = {read, multiply};

}  // namespace microscale
