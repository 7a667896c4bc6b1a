// What a product with a tile load costs by how many tile registers are in use, on a core of one's own and on one that
// somebody else uses too: the reason why csrc/kernels/amx_tiles.h leaves two of the eight untouched.
//
//   g++ -O2 -std=c++20 -mamx-tile -mamx-bf16 bench/amx_tiles.cc -o amx_tiles -pthread
//   ./amx_tiles 8 3          threads, seconds
//
// Nanoseconds: the median, and in brackets the first and last tenth. A core that is shared issues half as many
// instructions to each thread, so samples are sorted by whether twelve additions fit beside a multiplication of three
// cycles, before and behind them. Where no core is shared, one thread for every virtual processor makes it so.
#include <immintrin.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
struct Sample {
  double time, before, after;  // the latter two: additions and multiplications over multiplications alone
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The instructions name their tiles in their text.
template <int kTile>
inline __attribute__((always_inline)) void load(const uint8_t *from) {
#define LOAD(t) \
  if constexpr (kTile == t) _tile_loadd(t, from, 64);
  LOAD(4) LOAD(5) LOAD(6) LOAD(7)
#undef LOAD
}
template <int kSum, int kWeights>
inline __attribute__((always_inline)) void multiply() {
#define MULTIPLY(s, w) \
  if constexpr (kSum == s && kWeights == w) _tile_dpbf16ps(s, 4, w);
#define EACH(s) MULTIPLY(s, 5) MULTIPLY(s, 6) MULTIPLY(s, 7)
  EACH(0) EACH(1) EACH(2) EACH(3)
#undef EACH
#undef MULTIPLY
}

// Products and loads in turn, on kSums tiles in turn and kWeights tiles in turn.
template <int kSums, int kWeights, int i = 0>
inline __attribute__((always_inline)) void twelve(const uint8_t *from) {
  if constexpr (i < 12) {
    load<5 + i % kWeights>(from + i % 4 * 1024);
    multiply<i % kSums, 5 + i % kWeights>();
    twelve<kSums, kWeights, i + 1>(from);
  }
}
template <int kSums, int kWeights>
void products(const uint8_t *from) {
  for (int i = 0; i < 50; ++i) twelve<kSums, kWeights>(from);
}
// The core's schedules without decoding: a step of R tiles of rows (tile 4) times P of weights (tile 5), forth and back
// through the weights, so that neighbours share a tile.
template <int R, int P, int i = 0>
inline __attribute__((always_inline)) void step(const uint8_t *from) {
  if constexpr (i < R * P) {
    constexpr int within = i % P, back = i / P % 2, panel = back ? P - 1 - within : within;
    if constexpr (within == 0) load<4>(from + i / P % 2 * 1024);
    if constexpr (i == 0 || (P > 1 && within > 0)) load<5>(from + 2048 + panel * 1024);
    multiply<i / P * P + panel, 5>();
    step<R, P, i + 1>(from);
  }
}
template <int R, int P>
void steps(const uint8_t *from) {
  for (int i = 0; i < 600 / (R * P); ++i) step<R, P>(from);
}
void one_load_for_three(const uint8_t *from) {
  load<5>(from);
  for (int i = 0; i < 200; ++i) load<4>(from), multiply<0, 5>(), multiply<1, 5>(), multiply<2, 5>();
}
void only_loads(const uint8_t *from) {
  for (int i = 0; i < 600; ++i) load<5>(from + i % 4 * 1024);
}
void only_products_3(const uint8_t *) {
  for (int i = 0; i < 200; ++i) multiply<0, 5>(), multiply<1, 5>(), multiply<2, 5>();
}
void only_products_8(const uint8_t *from) {
  load<5>(from), load<6>(from), load<7>(from);
  for (int i = 0; i < 75; ++i) {
    multiply<0, 5>(), multiply<1, 6>(), multiply<2, 7>(), multiply<3, 5>();
    multiply<0, 6>(), multiply<1, 7>(), multiply<2, 5>(), multiply<3, 6>();
  }
}
void only_products(const uint8_t *) {
  for (int i = 0; i < 150; ++i) multiply<0, 5>(), multiply<1, 5>(), multiply<2, 5>(), multiply<3, 5>();
}

struct Case {
  const char *name;
  void (*run)(const uint8_t *);  // 600 of what is named
};
constexpr Case kCases[] = {{"loads", only_loads},
                           {"products, 3 sums", only_products_3},
                           {"products, 4 sums", only_products},
                           {"products, 8 tiles", only_products_8},
                           {"both, 3 tiles: 1 sum", products<1, 1>},
                           {"both, 4 tiles: 2 sums", products<2, 1>},
                           {"both, 4 tiles: 1 sum, 2 weights", products<1, 2>},
                           {"both, 5 tiles: 3 sums", products<3, 1>},
                           {"both, 5 tiles: 2 sums, 2 weights", products<2, 2>},
                           {"both, 6 tiles: 4 sums", products<4, 1>},
                           {"both, 6 tiles: 3 sums, 2 weights", products<3, 2>},
                           {"both, 7 tiles: 4 sums, 2 weights", products<4, 2>},
                           {"both, 8 tiles: 4 sums, 3 weights", products<4, 3>},
                           {"rows by weights, 2x2: 5 loads for 4", steps<2, 2>},
                           {"rows by weights, 3x1: 4 loads for 3", steps<3, 1>},
                           {"rows by weights, 2x1: 3 loads for 2", steps<2, 1>},
                           {"a load for 3 products", one_load_for_three}};
constexpr int kCount = sizeof kCases / sizeof *kCases;

// Three thousand cycles, and six thousand additions that do not wait for each other.
double seconds_of_both() {
  const double start = now();
  uint64_t product = 1, sums[6] = {};
  for (int i = 0; i < 1000; ++i)
    __asm__ volatile(
        "imul $3, %0, %0\n add $1, %1\n add $1, %2\n add $1, %3\n add $1, %4\n add $1, %5\n add $1, %6\n"
        "add $1, %1\n add $1, %2\n add $1, %3\n add $1, %4\n add $1, %5\n add $1, %6"
        : "+r"(product), "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]));
  return now() - start;
}
double seconds_of_chain() {
  const double start = now();
  uint64_t product = 1;
  for (int i = 0; i < 1000; ++i) __asm__ volatile("imul $3, %0, %0" : "+r"(product));
  return now() - start;
}

double share() {
  const double chain = seconds_of_chain();
  return seconds_of_both() / chain;
}

void measure(double seconds, std::vector<Sample> *samples) {
  alignas(4096) static thread_local uint8_t numbers[4096];
  for (size_t i = 0; i < sizeof numbers; i += 2) {
    const auto number = static_cast<uint16_t>(0x3f80 + i * 37 % 128);
    std::memcpy(numbers + i, &number, 2);
  }
  Config c;
  for (int i = 0; i < 8; ++i) c.column_bytes[i] = 64, c.rows[i] = 16;
  for (const double end = now() + seconds; now() < end;)
    for (int i = 0; i < kCount; ++i) {
      __asm__ volatile("" ::"r"(&c) : "memory");
      _tile_loadconfig(&c);  // what no instruction has written since then occupies nothing
      _tile_loadd(4, numbers, 64);
      kCases[i].run(numbers);
      for (int repeat = 0; repeat < 8; ++repeat) {
        const double before = share(), start = now();
        kCases[i].run(numbers);
        const double time = (now() - start) / 600 * 1e9;
        samples[i].push_back({time, before, share()});
      }
      _tile_release();
    }
}

double quantile(std::vector<double> &v, double q) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0 : v[static_cast<size_t>(q * static_cast<double>(v.size() - 1))];
}

}  // namespace

int main(int argc, char **argv) {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0 || !__builtin_cpu_supports("amx-bf16")) {
    std::puts("no AMX here");
    return 1;
  }
  const auto threads = static_cast<size_t>(argc > 1 ? std::atoi(argv[1]) : 1);
  const double seconds = argc > 2 ? std::atof(argv[2]) : 1;
  std::vector<std::vector<Sample>> samples(threads * kCount);
  std::vector<std::thread> others;
  for (size_t t = 1; t < threads; ++t) others.emplace_back(measure, seconds, &samples[t * kCount]);
  measure(seconds, samples.data());
  for (std::thread &t : others) t.join();
  for (size_t i = 0; i < kCount; ++i) {
    std::printf("%-36s", kCases[i].name);
    for (const bool shared : {false, true}) {
      std::vector<double> times;
      for (size_t t = 0; t < threads; ++t)
        for (const Sample &s : samples[t * kCount + i])
          if (shared ? std::min(s.before, s.after) > 1.3 : std::max(s.before, s.after) < 1.2) times.push_back(s.time);
      const double middle = quantile(times, .5), low = quantile(times, .1), high = quantile(times, .9);
      std::printf("  %s %5.1f (%5.1f to %5.1f) of %5zu", shared ? "shared" : "alone", middle, low, high, times.size());
    }
    std::puts("");
  }
  return 0;
}
