// vLLM's CPU operator beside ours as vllm_cpu.py does it, in C++: for machines on which PyTorch 2.13 cannot be
// installed, but four of its libraries can be put into a folder.
//
//   cmake -S . -B build/bench -G Ninja -DMICROSCALE_MODULE=OFF && ninja -C build/bench
//   T=$(python -c 'import torch; print(torch.__path__[0])')      # 2.13.0+cpu
//   I="-Icsrc -I$T/include -I$T/include/torch/csrc/api/include"
//   L="-L$T/lib -ltorch_cpu -lc10 -Wl,--no-as-needed -ltorch -Wl,-z,lazy -pthread -ldl"
//   g++ -O2 -std=c++20 $I bench/peers/vllm_cpu.cc $(find build/bench -name '*.o') $L -o vllm_cpu
//   LD_LIBRARY_PATH=DIR ./vllm_cpu DIR/_C.abi3.so gpt-oss-20b 1,4,16,64,256,1024 15
//
// DIR holds libtorch_cpu.so, libtorch.so, libc10.so, libgomp.so.1 and libnuma.so.1, and _C.abi3.so of vllm-cpu 0.32.0.
// Its symbols of Python stay unresolved, which is why everything is bound late. Two threads; pin them with taskset.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../cold_experts.h"
#include "microscale.h"
#include "pages.h"

namespace {

float from_bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

at::Tensor converted(const char *name, const at::Tensor &t) {
  std::vector<c10::IValue> stack{t};
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
  return stack[0].toTensor();
}

struct Call {
  std::vector<uint16_t> x;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  int64_t hit;
};

class Bench {
 public:
  explicit Bench(const Shape &shape) : s_(shape) {
    const int64_t n[2] = {2 * s_.inner, s_.hidden}, k[2] = {s_.hidden, s_.inner};
    std::vector<at::Tensor> theirs;
    for (int j = 0; j < 2; ++j) bytes_ += static_cast<size_t>(ms_packed_bytes(MS_MXFP4, s_.experts, n[j], k[j]));
    layers_ = std::max<size_t>(1, (kCold + bytes_ - 1) / bytes_);
    for (int j = 0; j < 2; ++j) {
      at::Tensor codes = at::randint(256, {s_.experts, n[j], k[j] / 2}, at::kByte);
      at::Tensor scales = at::randint(118, 122, {s_.experts, n[j], k[j] / 32}, at::kByte);
      const auto size = static_cast<size_t>(ms_packed_bytes(MS_MXFP4, s_.experts, n[j], k[j]));
      for (size_t l = 0; l < layers_; ++l) {
        packed_[j].push_back(room(size));
        ms_pack(MS_MXFP4, s_.experts, n[j], k[j], codes.data_ptr<uint8_t>(), scales.data_ptr(), packed_[j][l],
                kThreads);
      }
      theirs.push_back(converted("_C::convert_weight_packed", codes));
      theirs.push_back(converted("_C::convert_scale_packed", scales));
      biases_.push_back(at::full({s_.experts, n[j]}, 0.1f));
    }
    for (size_t l = 0; l < layers_; ++l) {
      theirs_.emplace_back();
      for (const auto &t : theirs) theirs_[l].push_back(t.clone());
    }
  }

  Call call(int64_t m) {
    Call c;
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < m * s_.hidden; ++i) {
      const float v = normal(random_);
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      c.x.push_back(static_cast<uint16_t>(bits >> 16));
    }
    std::vector<int64_t> order(static_cast<size_t>(s_.experts)), hit(order.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    for (int64_t i = 0; i < m; ++i) {
      std::shuffle(order.begin(), order.end(), random_);
      for (int64_t t = 0; t < s_.top_k; ++t) {
        c.ids.push_back(order[static_cast<size_t>(t)]);
        hit[static_cast<size_t>(order[static_cast<size_t>(t)])] = 1;
      }
    }
    c.weights.assign(c.ids.size(), 1.0f / static_cast<float>(s_.top_k));
    c.hit = std::count(hit.begin(), hit.end(), 1);
    return c;
  }

  // Both return seconds; the second of two calls on different layers is timed, after both pools have gone to sleep.
  double ours(int64_t m, const Call &c, std::vector<uint16_t> &y) {
    y.resize(c.x.size());
    const ms_activation activation{s_.oai ? MS_SWIGLU_OAI : MS_SILU, 1, s_.oai, 1.702f, 1.0f, s_.oai ? 7.0f : INFINITY};
    const float *b13 = s_.oai ? biases_[0].data_ptr<float>() : nullptr;
    const float *b2 = s_.oai ? biases_[1].data_ptr<float>() : nullptr;
    return timed([&](size_t layer) {
      ms_moe(ms_level(), packed_[0][layer], nullptr, packed_[1][layer], nullptr, MS_BF16, c.x.data(), nullptr, m,
             c.ids.data(), c.weights.data(), s_.top_k, &activation, b13, b2, 0, y.data(), kThreads);
    });
  }
  double peer(int64_t m, const Call &c, std::vector<uint16_t> &y) {
    y.resize(c.x.size());
    std::vector<int32_t> ids(c.ids.begin(), c.ids.end());
    const auto from = [](const auto *p, int64_t rows, int64_t columns, at::ScalarType type) {
      return at::from_blob(const_cast<void *>(static_cast<const void *>(p)), {rows, columns}, type);
    };
    const at::Tensor x = from(c.x.data(), m, s_.hidden, at::kBFloat16),
                     out = from(y.data(), m, s_.hidden, at::kBFloat16);
    const at::Tensor i = from(ids.data(), m, s_.top_k, at::kInt), w = from(c.weights.data(), m, s_.top_k, at::kFloat);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("_C::fused_experts_cpu", "");
    const auto given = [&](auto value) { return s_.oai ? c10::IValue(value) : c10::IValue(); };
    return timed([&](size_t layer) {
      const auto &l = theirs_[layer];
      const c10::IValue none;
      std::vector<c10::IValue> stack{
          out,  x,    l[0], l[2], w,    i,    int64_t{4},  // MXFP4
          l[1], l[3], none, none, none, none, given(biases_[0]), given(biases_[1]), given(1.702), given(7.0), true};
      const auto &arguments = op.schema().arguments();
      while (stack.size() < arguments.size()) stack.push_back(*arguments[stack.size()].default_value());
      op.callBoxed(&stack);
    });
  }

  double bytes(const Call &c) const {
    return static_cast<double>(bytes_) / static_cast<double>(s_.experts) * static_cast<double>(c.hit);
  }
  double flops(int64_t m) const { return 6.0 * static_cast<double>(m * s_.top_k * s_.hidden * s_.inner); }

 private:
  template <class F>
  double timed(F run) {
    usleep(10000);
    for (int untimed = 1;; --untimed) {
      const size_t layer = next_++ % layers_;
      const double start = now();
      run(layer);
      if (!untimed) return now() - start;
    }
  }

  Shape s_;
  size_t bytes_ = 0, layers_ = 1, next_ = 0;
  std::vector<uint8_t *> packed_[2];
  std::vector<std::vector<at::Tensor>> theirs_;
  std::vector<at::Tensor> biases_;
  std::mt19937_64 random_{7};
};

double difference(const std::vector<uint16_t> &a, const std::vector<uint16_t> &b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += std::pow(from_bf16(a[i]) - from_bf16(b[i]), 2);
    size += std::pow(from_bf16(b[i]), 2);
  }
  return std::sqrt(error / size);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: vllm_cpu LIBRARY SHAPE M,M,... REPEAT\n");
    return 2;
  }
  if (!dlopen(argv[1], RTLD_LAZY | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  at::set_num_threads(kThreads);
  const at::NoGradGuard no_gradients;
  const auto shape = std::find_if(std::begin(kShapes), std::end(kShapes), [&](auto &s) { return s.name == argv[2]; });
  if (shape == std::end(kShapes)) {
    std::fprintf(stderr, "%s: no such shape\n", argv[2]);
    return 2;
  }
  Bench bench(*shape);
  constexpr int64_t kWindow = 64 << 20, kMemory = 20 * kWindow;
  uint8_t *memory = room(kMemory);
  microscale::use_large_pages(memory, kMemory);
  std::memset(memory, 1, kMemory);
  int64_t at = 0;
  std::printf("| shape | M | peer ms | ours ms | peer/ours | by minimum | of floor | read GB/s | TFLOP/s | error |\n");
  std::stringstream list(argv[3]);
  for (std::string word; std::getline(list, word, ',');) {
    const int64_t m = std::stoll(word);
    std::vector<double> ours, peer, reads, multiplies, floors;
    double error = 0;
    for (int i = 0; i < std::stoi(argv[4]); ++i) {
      const Call call = bench.call(m);
      double read = 0, multiply = 0;
      ms_read_rate(memory + at, kWindow, kThreads, &read);
      ms_multiply_rate(ms_level(), kThreads, &multiply);
      at = (at + kWindow) % kMemory;
      std::vector<uint16_t> a, b;
      peer.push_back(bench.peer(m, call, b));
      ours.push_back(bench.ours(m, call, a));
      error = std::max(error, difference(a, b));
      reads.push_back(read);
      multiplies.push_back(multiply);
      floors.push_back(std::max(bench.bytes(call) / read, bench.flops(m) / multiply) / ours.back());
    }
    const double least = *std::min_element(peer.begin(), peer.end()) / *std::min_element(ours.begin(), ours.end());
    std::printf("| %s | %ld | %.3g | %.3g | %.2f | %.2f | %.2f | %.1f | %.2f | %.4f |\n", argv[2], long(m),
                1e3 * median(peer), 1e3 * median(ours), median(peer) / median(ours), least, median(floors),
                median(reads) / 1e9, median(multiplies) / 1e12, error);
    std::fflush(stdout);
  }
  return 0;
}
