// The machine's ceilings: how fast it reads, and how fast it multiplies at a level.
#include "kernels/ceilings.h"

#include <algorithm>
#include <chrono>

#include "buffer.h"
#include "dispatch.h"
#include "parallel.h"

namespace microscale {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr int64_t kUnit = 1 << 18;       // bytes handed out at a time
constexpr double kUnitSeconds = 0.5e-3;  // of multiplication handed out at a time
constexpr double kSeconds = 15e-3;       // of multiplication measured

const Ceilings *ceilings_for(int level) {
  if (level < 0 || level > ms_level()) return nullptr;
  switch (level) {
#ifdef MICROSCALE_HAVE_AMX
    case MS_AMX: return &amx_ceilings;
#endif
#ifdef MICROSCALE_HAVE_AVX512_BF16
    case MS_AVX512_BF16: return &avx512_bf16_ceilings;
#endif
#ifdef MICROSCALE_HAVE_AVX512
    case MS_AVX512: return &avx512_ceilings;
#endif
#ifdef MICROSCALE_HAVE_AVX2
    case MS_AVX2: return &avx2_ceilings;
#endif
    default: return &plain_ceilings;
  }
}

constexpr double kWakeSeconds = 100e-6;

// So that what follows is not the time in which sleepers wake.
void wake(int threads) {
  const auto start = Clock::now();
  do parallel(threads, threads, [](void *, int64_t, int) {}, nullptr);
  while (since(start) < kWakeSeconds);
}

struct alignas(64) Result {
  uint64_t seen = 0;
  float sum = 0;
  int64_t flops = 0;
};

struct Reading {
  const Ceilings *ceilings;
  const uint8_t *from;
  int64_t bytes;
  Result *results;

  static void run(void *context, int64_t unit, int thread) {
    const Reading &c = *static_cast<const Reading *>(context);
    const int64_t at = unit * kUnit, left = c.bytes - at;
    c.results[thread].seen ^= c.ceilings->read(c.from + at, left < kUnit ? left : kUnit);
  }
};

struct Multiplying {
  const Ceilings *ceilings;
  int64_t rounds;
  Result *results;

  static void run(void *context, int64_t, int thread) {
    const Multiplying &c = *static_cast<const Multiplying *>(context);
    c.results[thread].flops += c.ceilings->multiply(c.rounds, &c.results[thread].sum);
  }
};

}  // namespace
}  // namespace microscale

extern "C" int ms_read_rate(const void *from, int64_t bytes, int threads, double *rate) {
  using namespace microscale;
  if (!from || reinterpret_cast<uintptr_t>(from) % 64 || bytes < kReadStep || bytes % kReadStep || threads < 1 || !rate)
    return MS_BAD_ARGUMENT;
  Buffer<Result> results(threads);
  if (!results) return MS_NO_MEMORY;
  std::fill_n(results.get(), threads, Result{});
  Reading c{ceilings_for(ms_level()), static_cast<const uint8_t *>(from), bytes, results.get()};
  wake(threads);
  const auto start = Clock::now();
  parallel(threads, (bytes + kUnit - 1) / kUnit, Reading::run, &c);
  *rate = static_cast<double>(bytes) / since(start);
  return MS_OK;
}

extern "C" int ms_multiply_rate(int level, int threads, double *rate) {
  using namespace microscale;
  const Ceilings *ceilings = ceilings_for(level);
  if (!ceilings) return MS_BAD_LEVEL;
  if (threads < 1 || !rate) return MS_BAD_ARGUMENT;
  Buffer<Result> results(threads);
  if (!results) return MS_NO_MEMORY;
  std::fill_n(results.get(), threads, Result{});
  Multiplying c{ceilings, 512, results.get()};
  for (double seconds = 0; seconds < kUnitSeconds; c.rounds *= 2) {
    const auto start = Clock::now();
    Multiplying::run(&c, 0, 0);
    seconds = since(start);
  }
  parallel(threads, 2 * threads, Multiplying::run, &c);  // clocks fall when the widest units wake
  for (int i = 0; i < threads; ++i) results[i].flops = 0;
  const auto start = Clock::now();
  double seconds;
  do {
    parallel(threads, 4 * threads, Multiplying::run, &c);
    seconds = since(start);
  } while (seconds < kSeconds);
  int64_t flops = 0;
  for (int i = 0; i < threads; ++i) flops += results[i].flops;
  *rate = static_cast<double>(flops) / seconds;
  return MS_OK;
}
