#include "routes.h"

#include <algorithm>

#include "microscale.h"

namespace microscale {

int Routes::sort(const int64_t *ids, const float *weights, int64_t m, int64_t t, int64_t experts) {
  const int64_t all = m * t;
  Buffer<int64_t> next(experts + 1);
  token_ = Buffer<int64_t>(all);
  weight_ = Buffer<float>(all);
  const int64_t most = std::min(experts, all);
  hit_ = Buffer<int64_t>(most);
  first_ = Buffer<int64_t>(most + 1);
  by_size_ = Buffer<int64_t>(most);
  if (!next || !token_ || !weight_ || !hit_ || !first_ || !by_size_) return MS_NO_MEMORY;

  std::fill_n(next.get(), experts + 1, 0);
  for (int64_t i = 0; i < all; ++i) {
    if (ids[i] < -1 || ids[i] >= experts) return MS_BAD_ARGUMENT;
    if (ids[i] >= 0) ++next[ids[i]];
  }
  count_ = hit_count_ = largest_ = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t size = next[e];
    next[e] = count_;
    if (size == 0) continue;
    hit_[hit_count_] = e;
    first_[hit_count_++] = count_;
    largest_ = std::max(largest_, size);
    count_ += size;
  }
  first_[hit_count_] = count_;
  for (int64_t i = 0; i < all; ++i) {
    if (ids[i] < 0) continue;
    const int64_t route = next[ids[i]]++;
    token_[route] = i / t;
    weight_[route] = weights[i];
  }
  for (int64_t i = 0; i < hit_count_; ++i) by_size_[i] = i;
  std::sort(by_size_.get(), by_size_.get() + hit_count_,
            [this](int64_t a, int64_t b) { return size(a) != size(b) ? size(a) > size(b) : a < b; });
  return MS_OK;
}

}  // namespace microscale
