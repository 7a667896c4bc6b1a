// Memory of one call: aligned, given back when it ends, and null instead of an exception where there is none.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace microscale {

// Bytes between what threads write. A processor reads ahead of a thread that walks along its memory, also past the end,
// and lines of another thread's that it takes so have to be taken back.
constexpr int64_t kApart = 4096;

// At least `bytes` bytes at a multiple of 64, in large pages if they are many; null where there are none. Large blocks
// that were given back are kept for the next call, a few and not the largest: a page that the system hands out anew
// costs more than what a product does with it.
void *take_memory(size_t bytes);
void give_memory(void *memory);

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : data_(static_cast<T *>(take_memory(static_cast<size_t>(count) * sizeof(T)))) {}
  Buffer(Buffer &&other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer &operator=(Buffer &&other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { give_memory(data_); }

  T *get() const { return data_; }
  T &operator[](int64_t i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T *data_ = nullptr;
};

}  // namespace microscale
