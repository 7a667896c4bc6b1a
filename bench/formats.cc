// formats.py under AMX without Python, for machines on which the package cannot be installed: MoE in every format, in
// turn, two threads.
//
//   cmake -S . -B build/bench -G Ninja -DMICROSCALE_MODULE=OFF && ninja -C build/bench
//   g++ -O2 -std=c++20 -Icsrc bench/formats.cc $(find build/bench -name '*.o') -pthread -o formats
//   ./formats qwen3-30b-a3b 1,4,16,64,256 11
//
// Milliseconds, the median, and over what a format's bytes predict from MXFP4's time in the same round: the median, and
// its least time over MXFP4's least. All formats get the same tokens and routes. Pin threads with taskset.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>

#include "cold_experts.h"
#include "layout.h"
#include "microscale.h"

namespace {

constexpr int kPackThreads = 16;  // more than this machine has do no harm
const char *const kNames[MS_FORMATS] = {"mxfp4",      "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3",
                                        "mxfp8_e5m2", "mxint8",     "nvfp4",      "fp8_block128"};

struct Format {
  double bytes = 0;
  std::vector<uint8_t *> packed[2];  // of each cold layer
  size_t next = 0;
  std::vector<double> times, ratios;
};

class Bench {
 public:
  explicit Bench(const Shape &shape) : s_(shape), formats_(MS_FORMATS) {
    const int64_t n[2] = {2 * s_.inner, s_.hidden}, k[2] = {s_.hidden, s_.inner};
    for (int f = 0; f < MS_FORMATS; ++f) {
      Format &format = formats_[static_cast<size_t>(f)];
      for (int j = 0; j < 2; ++j) format.bytes += static_cast<double>(ms_packed_bytes(f, s_.experts, n[j], k[j]));
      const size_t layers = static_cast<size_t>(std::ceil(static_cast<double>(kCold) / format.bytes));
      for (int j = 0; j < 2; ++j) {
        const std::vector<uint8_t> codes = codes_of(f, n[j], k[j]), scales = scales_of(f, n[j], k[j]);
        const int64_t bytes = ms_packed_bytes(f, s_.experts, n[j], k[j]);
        for (size_t layer = 0; layer < layers; ++layer) {
          format.packed[j].push_back(room(static_cast<size_t>(bytes)));
          ms_pack(f, s_.experts, n[j], k[j], codes.data(), scales.data(), format.packed[j].back(), kPackThreads);
        }
      }
    }
    for (int j = 0; j < 2; ++j) biases_[j].assign(static_cast<size_t>(s_.experts * n[j]), 0.1f);
  }

  void measure(int64_t m, int rounds) {
    for (Format &f : formats_) f.times.clear(), f.ratios.clear();
    for (int round = 0; round < rounds; ++round) {
      draw(m);
      for (int i = 0; i < MS_FORMATS; ++i) {
        const int f = (i + round) % MS_FORMATS;  // nobody is always the first
        usleep(200);
        call(f, m);  // wakes threads
        formats_[static_cast<size_t>(f)].times.push_back(call(f, m));
      }
      for (Format &f : formats_)
        f.ratios.push_back(f.times.back() / formats_[0].times.back() * formats_[0].bytes / f.bytes);
    }
    const auto least = [](const Format &f) { return *std::min_element(f.times.begin(), f.times.end()) / f.bytes; };
    for (int f = 0; f < MS_FORMATS; ++f) {
      const Format &format = formats_[static_cast<size_t>(f)];
      std::printf("%s %-13s M=%-4lld %8.3f ms %5.2f %5.2f\n", s_.name.c_str(), kNames[f], static_cast<long long>(m),
                  1e3 * median(format.times), median(format.ratios), least(format) / least(formats_[0]));
    }
    std::fflush(stdout);
  }

 private:
  // Numbers only: no byte of an 8-bit format is a NaN.
  std::vector<uint8_t> codes_of(int format, int64_t n, int64_t k) {
    std::vector<uint8_t> codes(static_cast<size_t>(s_.experts * n * microscale::row_bytes(format, k)));
    constexpr size_t kRandom = 1 << 20;  // the rest are copies
    for (size_t i = 0; i < std::min(codes.size(), kRandom); ++i) codes[i] = static_cast<uint8_t>(random_() & 0xbb);
    for (size_t i = kRandom; i < codes.size(); i += kRandom)
      std::memcpy(codes.data() + i, codes.data(), std::min(codes.size() - i, kRandom));
    return codes;
  }
  std::vector<uint8_t> scales_of(int format, int64_t n, int64_t k) {
    const int64_t count = microscale::scale_rows(format, n) * microscale::scale_columns(format, k) * s_.experts;
    if (format != MS_FP8_BLOCK128)
      return std::vector<uint8_t>(static_cast<size_t>(count), format == MS_NVFP4 ? 0x30 : 120);
    const std::vector<float> scales(static_cast<size_t>(count), 0.01f);
    std::vector<uint8_t> bytes(scales.size() * sizeof(float));
    std::memcpy(bytes.data(), scales.data(), bytes.size());
    return bytes;
  }
  void draw(int64_t m) {
    x_.clear();
    for (int64_t i = 0; i < m * s_.hidden; ++i) x_.push_back(static_cast<uint16_t>(0x3f00 + (random_() & 0x80ff)));
    std::vector<int64_t> order(static_cast<size_t>(s_.experts));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    ids_.clear();
    for (int64_t i = 0; i < m; ++i) {
      std::shuffle(order.begin(), order.end(), random_);
      ids_.insert(ids_.end(), order.begin(), order.begin() + s_.top_k);
    }
    weights_.assign(ids_.size(), 1.0f / static_cast<float>(s_.top_k));
    y_.resize(x_.size());
  }
  double call(int f, int64_t m) {
    Format &format = formats_[static_cast<size_t>(f)];
    const size_t layer = format.next++ % format.packed[0].size();
    const ms_activation activation{s_.oai ? MS_SWIGLU_OAI : MS_SILU, 1, s_.oai, 1.702f, 1.0f, s_.oai ? 7.0f : INFINITY};
    const double start = now();
    ms_moe(ms_level(), format.packed[0][layer], nullptr, format.packed[1][layer], nullptr, MS_BF16, x_.data(), nullptr,
           m, ids_.data(), weights_.data(), s_.top_k, &activation, s_.oai ? biases_[0].data() : nullptr,
           s_.oai ? biases_[1].data() : nullptr, 0, y_.data(), kThreads);
    return now() - start;
  }

  Shape s_;
  std::vector<Format> formats_;
  std::vector<float> biases_[2], weights_;
  std::vector<uint16_t> x_, y_;
  std::vector<int64_t> ids_;
  std::mt19937_64 random_{7};
};

}  // namespace

int main(int argc, char **argv) {
  const auto shape = std::find_if(std::begin(kShapes), std::end(kShapes),
                                  [&](const Shape &s) { return argc == 4 && s.name == argv[1]; });
  if (shape == std::end(kShapes)) {
    std::fprintf(stderr, "usage: formats qwen3-30b-a3b|gpt-oss-20b M,M,... ROUNDS\n");
    return 2;
  }
  Bench bench(*shape);
  std::printf("level %d; ms, over what bytes predict from mxfp4: median, by least times\n", ms_level());
  std::stringstream list(argv[2]);
  for (std::string m; std::getline(list, m, ',');) bench.measure(std::stoll(m), std::stoi(argv[3]));
  return 0;
}
