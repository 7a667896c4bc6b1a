// What instructions cost that AMX kernels decode and multiply with, alone and side by side, in cycles: the reasons for
// how csrc/kernels/amx_decode.h and isa_amx.cc are written. One thread, everything in L1 or L2.
//
//   g++ -O2 -std=c++20 -mavx512f -mavx512bw -mavx512vbmi -mamx-tile -mamx-bf16 bench/amx_ports.cc -o amx_ports
//   taskset -c 0 ./amx_ports
//
// A cycle is a sixteenth of what 16 shifts take: they have one port. Under products the clock falls by a fifth: compare
// their rows with each other. Least of 9 times. Without AMX, the last rows are left out.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
alignas(4096) uint8_t near[16 << 10], far[256 << 10];  // in L1; in L2
double cycle = 0;                                      // nanoseconds

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class F>
double nanoseconds(F f) {
  constexpr int kRounds = 20000;
  double least = 1e9;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const double start = now();
    for (int i = 0; i < kRounds; ++i) f(i);
    least = std::min(least, (now() - start) / kRounds * 1e9);
  }
  return least;
}
template <class F>
void time(const char *name, F f) {
  const double t = nanoseconds(f);
  std::printf("%-44s %7.2f ns %6.1f cycles\n", name, t, t / cycle);
}

// Sixteen independent instructions of each kind that is named; the assembler's order of operands.
#define SIXTEEN(body) \
  _Pragma("GCC unroll 16") for (int j = 0; j < 16; ++j) { body }
#define ONE(text)                                      \
  {                                                    \
    __m512i r;                                         \
    __asm__ volatile(text : "=v"(r) : "v"(a), "v"(b)); \
  }
#define STORE \
  __asm__ volatile("vmovdqa64 %1, %0" : "=m"(*reinterpret_cast<__m512i *>(near + i % 8 * 1024 + 64 * j)) : "v"(a));
#define WORDS ONE("vpermw %1, %2, %0")
#define BYTES ONE("vpermb %1, %2, %0")
#define FIELDS ONE("vpmultishiftqb %1, %2, %0")
#define SHIFT ONE("vpsrlw $4, %1, %0")
#define SATURATE ONE("vpsubusw %1, %2, %0")
#define SUBTRACT ONE("vpsubw %1, %2, %0")
#define LOGIC ONE("vpandd %1, %2, %0")

bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && __builtin_cpu_supports("amx-bf16");
}

void vectors() {
  const __m512i a = _mm512_loadu_si512(far), b = _mm512_loadu_si512(far + 64);
  cycle = nanoseconds([&](int) { SIXTEEN(SHIFT) }) / 16;
  time("16 vpsrlw", [&](int) { SIXTEEN(SHIFT) });
  time("16 vpsubusw", [&](int) { SIXTEEN(SATURATE) });
  time("16 vpsubw", [&](int) { SIXTEEN(SUBTRACT) });
  time("16 vpandd", [&](int) { SIXTEEN(LOGIC) });
  time("16 vpermw", [&](int) { SIXTEEN(WORDS) });
  time("16 vpermb", [&](int) { SIXTEEN(BYTES) });
  time("16 vpmultishiftqb", [&](int) { SIXTEEN(FIELDS) });
  time("16 vpermw, 16 vpsrlw", [&](int) { SIXTEEN(WORDS SHIFT) });
  time("16 vpermw, 16 vpsubusw", [&](int) { SIXTEEN(WORDS SATURATE) });
  time("16 vpermw, 16 vpsubw", [&](int) { SIXTEEN(WORDS SUBTRACT) });
  time("16 vpermb, 16 vpsrlw", [&](int) { SIXTEEN(BYTES SHIFT) });
  time("16 vpermb, 16 vpmultishiftqb", [&](int) { SIXTEEN(BYTES FIELDS) });
  time("16 stores", [&](int i) { SIXTEEN(STORE) });
  time("16 vpermw, 16 stores", [&](int i) { SIXTEEN(WORDS STORE) });
}

void tiles() {
  const __m512i a = _mm512_loadu_si512(far), b = _mm512_loadu_si512(far + 64);
  Config c;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
  __asm__ volatile("" ::"r"(&c) : "memory");
  _tile_loadconfig(&c);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto load = [](const uint8_t *from) __attribute__((always_inline)) {
    _tile_loadd(4, from, 64);
    _tile_loadd(5, from + 1024, 64);
    _tile_loadd(6, from + 2048, 64);
    _tile_loadd(7, from + 3072, 64);
  };
  load(near);
  time("2 tdpbf16ps", [&](int) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 7);
  });
#define TWO_PRODUCTS                   \
  if (j == 0) _tile_dpbf16ps(0, 4, 6); \
  if (j == 8) _tile_dpbf16ps(1, 5, 7);
  time("2 tdpbf16ps, 32 vpsrlw", [&](int) { SIXTEEN(SHIFT SHIFT TWO_PRODUCTS) });
  time("2 tdpbf16ps, 32 vpsubusw", [&](int) { SIXTEEN(SATURATE SATURATE TWO_PRODUCTS) });
  time("2 tdpbf16ps, 32 vpermw", [&](int) { SIXTEEN(WORDS WORDS TWO_PRODUCTS) });
  time("2 tdpbf16ps, 32 vpermb", [&](int) { SIXTEEN(BYTES BYTES TWO_PRODUCTS) });
  time("2 tdpbf16ps, 16 vpermb", [&](int) { SIXTEEN(BYTES TWO_PRODUCTS) });
  time("2 tdpbf16ps, 16 vpermb, 16 vpsubusw", [&](int) { SIXTEEN(BYTES SATURATE TWO_PRODUCTS) });
  time("2 tdpbf16ps, 16 stores", [&](int i) { SIXTEEN(STORE TWO_PRODUCTS) });
  time("4 tile loads from L1", [&](int i) { load(near + i % 4 * 4096); });
  time("4 tile loads from L2", [&](int i) { load(far + i % 64 * 4096); });
  // As the kernels for 48 rows: of seven loads for six products, three come from L2.
  time("6 tdpbf16ps, 7 tile loads", [&](int i) {
    const uint8_t *rows = far + i % 80 * 3072, *weights = near + i % 4 * 2048;
    _tile_loadd(6, rows, 64);
    _tile_loadd(7, weights, 64);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(7, weights + 1024, 64);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(6, rows + 1024, 64);
    _tile_dpbf16ps(3, 6, 7);
    _tile_loadd(7, weights, 64);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, rows + 2048, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, weights + 1024, 64);
    _tile_dpbf16ps(5, 6, 7);
  });
  _tile_release();
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (size_t i = 0; i < sizeof far; i += 2) {
    const auto number = static_cast<uint16_t>(0x3f80 + (random() & 0x807f));  // 1 to 2, of either sign
    std::memcpy(far + i, &number, 2);
  }
  std::memcpy(near, far, sizeof near);
  vectors();
  if (has_amx())
    tiles();
  else
    std::puts("no AMX here");
  return 0;
}
