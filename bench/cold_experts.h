// What programs that time experts over cold weights have in common: the shapes, threads, clock, and memory.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

constexpr int kThreads = 2;
constexpr size_t kCold = size_t{1200} << 20;  // bytes of weights: several times a large cache

struct Shape {
  std::string name;
  int64_t experts, top_k, hidden, inner;
  bool oai;  // clamped swiglu with interleaved gates and ups, and biases
};
const Shape kShapes[] = {{"qwen3-30b-a3b", 128, 8, 2048, 768, false}, {"gpt-oss-20b", 32, 4, 2880, 2880, true}};

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// Untouched memory, so that packing can ask for large pages.
inline uint8_t *room(size_t bytes) {
  void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<uint8_t *>(p);
}
