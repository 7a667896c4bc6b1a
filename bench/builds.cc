// Several builds of the core, in turn: MoE in MXFP4, both ceilings probed between the calls. For changes of a few per
// cent, and for builds from which something was left out to see what it costs.
//
//   cmake -S . -B build/bench -G Ninja -DMICROSCALE_MODULE=OFF && ninja -C build/bench        in each tree
//   O=$(find build/bench -name '*.o')
//   g++ -O2 -std=c++20 -Icsrc -shared -fPIC -DAS_BUILD bench/builds.cc $O -pthread -o now.so
//   g++ -O2 -std=c++20 -Icsrc bench/builds.cc -ldl -pthread -o builds
//   ./builds gpt-oss-20b 1,16,256 15 ./before.so ./now.so
//
// Two threads; pin them with taskset. Milliseconds: the median and the least; the median of the first build's time over
// this one's in the same round; the median of the floor over the time; whether results are the first build's to the
// bit. Weights are all builds' own order of the first: they must share a layout.
#include "microscale.h"

struct Build {
  decltype(&ms_moe) moe;
  decltype(&ms_pack) pack;
  decltype(&ms_packed_bytes) packed_bytes;
  decltype(&ms_read_rate) read_rate;
  decltype(&ms_multiply_rate) multiply_rate;
  decltype(&ms_level) level;
};

#ifdef AS_BUILD
extern "C" __attribute__((visibility("default"))) const Build microscale_build;
const Build microscale_build = {ms_moe, ms_pack, ms_packed_bytes, ms_read_rate, ms_multiply_rate, ms_level};
#else

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cold_experts.h"
#include "pages.h"

namespace {

constexpr int64_t kWindow = 64 << 20, kMemory = 20 * kWindow;

class Bench {
 public:
  Bench(const Shape &shape, std::vector<const Build *> builds) : s_(shape), builds_(std::move(builds)) {
    const int64_t n[2] = {2 * s_.inner, s_.hidden}, k[2] = {s_.hidden, s_.inner};
    const Build &b = *builds_[0];
    for (int j = 0; j < 2; ++j) bytes_ += b.packed_bytes(MS_MXFP4, s_.experts, n[j], k[j]);
    layers_ = static_cast<size_t>(std::max<int64_t>(1, (static_cast<int64_t>(kCold) + bytes_ - 1) / bytes_));
    for (int j = 0; j < 2; ++j) {
      std::vector<uint8_t> codes(static_cast<size_t>(s_.experts * n[j] * k[j] / 2)), scales(codes.size() / 16);
      for (uint8_t &c : codes) c = static_cast<uint8_t>(random_());
      for (uint8_t &c : scales) c = static_cast<uint8_t>(118 + random_() % 4);
      for (size_t l = 0; l < layers_; ++l) {
        packed_[j].push_back(room(static_cast<size_t>(b.packed_bytes(MS_MXFP4, s_.experts, n[j], k[j]))));
        b.pack(MS_MXFP4, s_.experts, n[j], k[j], codes.data(), scales.data(), packed_[j][l], kThreads);
      }
      biases_[j].assign(static_cast<size_t>(s_.experts * n[j]), 0.1f);
    }
    memory_ = room(kMemory);
    microscale::use_large_pages(memory_, kMemory);
    std::memset(memory_, 1, kMemory);
  }

  void round(int64_t m) {
    std::vector<uint16_t> x(static_cast<size_t>(m * s_.hidden));
    std::normal_distribution<float> normal;
    for (uint16_t &v : x) {
      const float number = normal(random_);
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      v = static_cast<uint16_t>(bits >> 16);
    }
    std::vector<int64_t> order(static_cast<size_t>(s_.experts)), ids;
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    for (int64_t i = 0; i < m; ++i) {
      std::shuffle(order.begin(), order.end(), random_);
      ids.insert(ids.end(), order.begin(), order.begin() + s_.top_k);
    }
    const double hit = static_cast<double>(std::count_if(
        order.begin(), order.end(), [&](int64_t e) { return std::find(ids.begin(), ids.end(), e) != ids.end(); }));
    const std::vector<float> weights(ids.size(), 1.0f / static_cast<float>(s_.top_k));
    double read = 0, multiply = 0;
    builds_[0]->read_rate(memory_ + at_, kWindow, kThreads, &read);
    builds_[0]->multiply_rate(builds_[0]->level(), kThreads, &multiply);
    at_ = (at_ + kWindow) % kMemory;
    const double flops = 6.0 * static_cast<double>(m * s_.top_k * s_.hidden * s_.inner);
    floors.push_back(
        std::max(static_cast<double>(bytes_) / static_cast<double>(s_.experts) * hit / read, flops / multiply));
    const ms_activation activation{s_.oai ? MS_SWIGLU_OAI : MS_SILU, 1, s_.oai, 1.702f, 1.0f, s_.oai ? 7.0f : INFINITY};
    std::vector<std::vector<uint16_t> > y(builds_.size(), std::vector<uint16_t>(x.size()));
    for (size_t i = 0; i < builds_.size(); ++i) {
      const size_t b = (i + floors.size()) % builds_.size();  // nobody is always the first
      usleep(300);
      double seconds = 0;
      for (int call = 0; call < 2; ++call) {  // the first wakes threads
        const size_t layer = next_++ % layers_;
        const double start = now();
        builds_[b]->moe(builds_[b]->level(), packed_[0][layer], nullptr, packed_[1][layer], nullptr, MS_BF16, x.data(),
                        nullptr, m, ids.data(), weights.data(), s_.top_k, &activation,
                        s_.oai ? biases_[0].data() : nullptr, s_.oai ? biases_[1].data() : nullptr, 0, y[b].data(),
                        kThreads);
        seconds = now() - start;
      }
      times[b].push_back(seconds);
    }
    for (size_t b = 0; b < builds_.size(); ++b) same[b] = same[b] && y[b] == y[0];
  }
  void start() {
    floors.clear();
    times.assign(builds_.size(), {});
    same.assign(builds_.size(), true);
  }

  std::vector<double> floors;               // of each round, seconds
  std::vector<std::vector<double> > times;  // of each build and round
  std::vector<bool> same;

 private:
  Shape s_;
  std::vector<const Build *> builds_;
  int64_t bytes_ = 0, at_ = 0;
  size_t layers_ = 1, next_ = 0;
  std::vector<uint8_t *> packed_[2];
  std::vector<float> biases_[2];
  uint8_t *memory_ = nullptr;
  std::mt19937_64 random_{7};
};

}  // namespace

int main(int argc, char **argv) {
  const auto shape = std::find_if(std::begin(kShapes), std::end(kShapes),
                                  [&](const Shape &s) { return argc > 1 && s.name == argv[1]; });
  if (argc < 5 || shape == std::end(kShapes)) {
    std::fprintf(stderr, "usage: builds qwen3-30b-a3b|gpt-oss-20b M,M,... ROUNDS BUILD.so...\n");
    return 2;
  }
  std::vector<const Build *> builds;
  for (int i = 4; i < argc; ++i) {
    void *library = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
    builds.push_back(library ? static_cast<const Build *>(dlsym(library, "microscale_build")) : nullptr);
    if (!builds.back()) {
      std::fprintf(stderr, "%s\n", dlerror());
      return 1;
    }
  }
  Bench bench(*shape, builds);
  std::printf("| shape | M | build | ms | least | first/this | of floor | same bits |\n");
  std::stringstream list(argv[2]);
  for (std::string m; std::getline(list, m, ',');) {
    bench.start();
    for (int i = 0; i < std::stoi(argv[3]); ++i) bench.round(std::stoll(m));
    for (size_t b = 0; b < builds.size(); ++b) {
      const std::vector<double> &times = bench.times[b];
      std::vector<double> ratios, fractions;
      for (size_t i = 0; i < times.size(); ++i) {
        ratios.push_back(bench.times[0][i] / times[i]);
        fractions.push_back(bench.floors[i] / times[i]);
      }
      std::printf("| %s | %s | %s | %.3f | %.3f | %.3f | %.2f | %s |\n", argv[1], m.c_str(), argv[4 + b],
                  1e3 * median(times), 1e3 * *std::min_element(times.begin(), times.end()), median(ratios),
                  median(fractions), bench.same[b] ? "yes" : "no");
    }
    std::fflush(stdout);
  }
  return 0;
}
#endif
