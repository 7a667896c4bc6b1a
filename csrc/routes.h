// Tokens sorted by the experts they go to.
#pragma once
#include "buffer.h"

namespace microscale {

// The routes of some tokens, those of one expert together and in order of their tokens; -1 is no route.
class Routes {
 public:
  // MS_OK, MS_BAD_ARGUMENT for an id out of range, MS_NO_MEMORY.
  int sort(const int64_t *ids, const float *weights, int64_t m, int64_t t, int64_t experts);

  int64_t count() const { return count_; }
  int64_t experts() const { return hit_count_; }          // with a route
  int64_t expert(int64_t i) const { return hit_[i]; }     // ascending
  int64_t first(int64_t i) const { return first_[i]; }    // route of the i-th hit expert
  const int64_t *firsts() const { return first_.get(); }  // [experts + 1]
  int64_t size(int64_t i) const { return first_[i + 1] - first_[i]; }
  int64_t largest() const { return largest_; }              // most routes of one expert
  int64_t by_size(int64_t i) const { return by_size_[i]; }  // positions, most routes first
  const int64_t *tokens() const { return token_.get(); }    // [count]
  const float *weights() const { return weight_.get(); }    // [count]

 private:
  int64_t count_ = 0, hit_count_ = 0, largest_ = 0;
  Buffer<int64_t> token_, hit_, first_, by_size_;
  Buffer<float> weight_;
};

}  // namespace microscale
