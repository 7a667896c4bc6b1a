// Memory of one call: aligned, given back when it ends, and null instead of an exception where there is none.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <utility>

namespace microscale {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<T *>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {}
  Buffer(Buffer &&other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer &operator=(Buffer &&other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { std::free(data_); }

  T *get() const { return data_; }
  T &operator[](int64_t i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T *data_ = nullptr;
};

}  // namespace microscale
