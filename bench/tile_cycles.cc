// Cycles that one thread needs for a tile of 16 columns x 32 k, weights in the L2 cache: decoding and multiplication
// without memory, and so hardly any noise.
//
//   cmake -S . -B build/bench -G Ninja -DMICROSCALE_MODULE=OFF && ninja -C build/bench
//   g++ -O2 -std=c++20 -Icsrc bench/tile_cycles.cc $(find build/bench -name '*.o') -pthread -o tile_cycles
//   ./tile_cycles 1 2 3 4        levels (enum ms_level) of AVX2, AVX-512 and AMX
//
// Cycles are the time beside that of a chain of multiplications, of three cycles each: additions of constants take none
// where they are done as registers are renamed. Under AMX they are those of the clock without tiles, which lower it by
// a fifth. Time is the thread's own, so that other processes matter little. The median of 5 and, in brackets, the
// least.
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/table.h"
#include "layout.h"

namespace {

using namespace microscale;
constexpr int64_t kN = 64, kK = 2880;
constexpr int kRounds = 5;

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// The highest so far: whoever is interrupted counts too few.
double cycles_a_second() {
  constexpr int kMultiplications = 1 << 18;
  static double most = 0;
  const double start = now();
  uint64_t product = 1;
  for (int i = 0; i < kMultiplications; i += 8)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) __asm__ volatile("imul $3, %0, %0" : "+r"(product));
  most = std::max(most, 3 * kMultiplications / (now() - start));
  return most;
}

std::vector<uint8_t> random_bytes(int64_t count, unsigned low, unsigned mask) {
  static std::mt19937 random(1);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t &b : bytes) b = static_cast<uint8_t>(low + (random() & mask));
  return bytes;
}

void measure(const Kernels &kernels, int format, int64_t m) {
  const Traits &t = traits(format);
  const auto codes = random_bytes(kN * row_bytes(format, kK), 0, t.bits == 8 ? 0xbb : 0xff);
  const int64_t count = scale_rows(format, kN) * scale_columns(format, kK);
  auto scales = random_bytes(count * t.scale_bytes, t.scale == kE4M3 ? 0x30 : 120, 7);
  const float one = 1;
  for (int64_t i = 0; t.scale == kFloat32 && i < count; ++i) std::memcpy(scales.data() + 4 * i, &one, 4);
  const int64_t bytes = ms_packed_bytes(format, 1, kN, kK);
  auto *packed = static_cast<uint8_t *>(std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64));
  auto *scratch = static_cast<uint8_t *>(std::aligned_alloc(64, kernels.scratch + 64));
  if (!packed || !scratch || ms_pack(format, 1, kN, kK, codes.data(), scales.data(), packed, 1) != MS_OK) std::abort();

  const int64_t pitch = kK * 4 + 64, padded = (m + 15) / 16 * 16;
  auto *x =
      static_cast<uint8_t *>(std::calloc(static_cast<size_t>(padded), pitch));  // zeros multiply as fast as anything
  if (!x) std::abort();
  std::vector<const void *> rows;
  for (int64_t i = 0; i < m; ++i) rows.push_back(x + i * pitch);
  std::vector<float> out(static_cast<size_t>(padded * kN));
  int state = 0;
  Product p{};
  p.weights = p.next = packed + kHeaderBytes;
  p.n = kN, p.k = kK, p.count = panels(kN);
  p.rows = rows.data(), p.m = m;
  p.out = out.data(), p.stride = kN, p.scratch = scratch, p.state = &state;
  const auto seconds = [&](int64_t calls) {
    const double start = now();
    for (int64_t i = 0; i < calls; ++i) kernels.product[format](&p);
    return now() - start;
  };
  seconds(1);
  const auto calls = static_cast<int64_t>(std::max(1.0, 4e-3 / seconds(1)));
  std::vector<double> cycles;
  for (int i = 0; i < kRounds; ++i) {
    const double rate = cycles_a_second();
    cycles.push_back(seconds(calls) / static_cast<double>(calls) * rate / double(panels(kN) * tiles(kK)));
  }
  std::sort(cycles.begin(), cycles.end());
  std::printf(" %7.1f (%6.1f)", cycles[kRounds / 2], cycles[0]);
  if (kernels.end) kernels.end();
  std::free(packed);
  std::free(scratch);
  std::free(x);
}

}  // namespace

int main(int argc, char **argv) {
  const Kernels *const kernels[] = {&plain_kernels, &avx2_kernels, &avx512_kernels, &avx512_bf16_kernels, &amx_kernels};
  const char *const levels[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};
  const char *const formats[] = {"mxfp4",      "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3",
                                 "mxfp8_e5m2", "mxint8",     "nvfp4",      "fp8_block128"};
  for (int i = 1; i < argc; ++i) {
    const int level = std::atoi(argv[i]);
    if (level < 0 || level > ms_level()) {
      std::fprintf(stderr, "level %s: this machine has 0 to %d\n", argv[i], ms_level());
      return 1;
    }
    std::printf("%s, M = 1, 2, 4, 8, 16, 32, 48, 64\n", levels[level]);
    for (int format = 0; format < MS_FORMATS; ++format) {
      std::printf("%-14s", formats[format]);
      for (int64_t m : {1, 2, 4, 8, 16, 32, 48, 64}) measure(*kernels[level], format, m);
      std::puts("");
    }
  }
}
