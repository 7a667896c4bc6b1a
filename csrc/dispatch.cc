// What the processor and the operating system allow, asked once.
#include "dispatch.h"

#if defined(__x86_64__) && !defined(MICROSCALE_PLAIN_ONLY)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace microscale {
namespace {

#if defined(__x86_64__) && !defined(MICROSCALE_PLAIN_ONLY)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

uint64_t enabled_states() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool bit(unsigned word, int n) { return (word >> n) & 1; }

bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

int detect() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
  if (!bit(one.c, 27)) return MS_PLAIN;  // OSXSAVE
  const uint64_t states = enabled_states();
  const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6, tiles = (states & 0x60000) == 0x60000;
  // FMA, F16C, AVX; AVX2, BMI2
  if (!ymm || !bit(one.c, 12) || !bit(one.c, 29) || !bit(one.c, 28) || !bit(seven.b, 5) || !bit(seven.b, 8))
    return MS_PLAIN;
  // AVX-512 F, DQ, BW, VL
  if (!zmm || !bit(seven.b, 16) || !bit(seven.b, 17) || !bit(seven.b, 30) || !bit(seven.b, 31)) return MS_AVX2;
  if (!bit(more.a, 5)) return MS_AVX512;  // AVX512_BF16
#ifdef MICROSCALE_EMULATE_AMX
  return MS_AMX;
#endif
  // AVX512_VBMI; AMX BF16, TILE
  if (!bit(seven.c, 1) || !tiles || !bit(seven.d, 22) || !bit(seven.d, 24) || !amx_permitted()) return MS_AVX512_BF16;
  return MS_AMX;
}

#else

int detect() { return MS_PLAIN; }

#endif

constexpr int compiled() {
#if defined(MICROSCALE_PLAIN_ONLY) || !defined(__x86_64__)
  return MS_PLAIN;
#elif defined(MICROSCALE_HAVE_AMX)
  return MS_AMX;
#elif defined(MICROSCALE_HAVE_AVX512_BF16)
  return MS_AVX512_BF16;
#elif defined(MICROSCALE_HAVE_AVX512)
  return MS_AVX512;
#elif defined(MICROSCALE_HAVE_AVX2)
  return MS_AVX2;
#else
  return MS_PLAIN;
#endif
}

}  // namespace

const Kernels *kernels_for(int level, int dtype, bool special) {
  if (level < 0 || level > ms_level() || level > compiled()) return nullptr;
#ifdef MICROSCALE_HAVE_AMX
  if (level == MS_AMX && dtype == MS_BF16 && !special) return &amx_kernels;
#endif
#ifdef MICROSCALE_HAVE_AVX512_BF16
  if (level >= MS_AVX512_BF16 && dtype == MS_BF16) return &avx512_bf16_kernels;
#endif
#ifdef MICROSCALE_HAVE_AVX512
  if (level >= MS_AVX512) return &avx512_kernels;
#endif
#ifdef MICROSCALE_HAVE_AVX2
  if (level >= MS_AVX2) return &avx2_kernels;
#endif
  (void)dtype, (void)special;
  return &plain_kernels;
}

}  // namespace microscale

extern "C" int ms_level(void) {
  static const int level =
      microscale::detect() < microscale::compiled() ? microscale::detect() : microscale::compiled();
  return level;
}

extern "C" int ms_compiled_level(void) { return microscale::compiled(); }
