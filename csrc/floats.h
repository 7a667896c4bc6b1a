// Arithmetic as IEEE 754 has it by default, whatever the caller's thread was told (to flush subnormal numbers, as by
// torch.set_flush_denormal, or to round otherwise): threads of the pool were not, and a result would depend on whose
// thread it came from. A scale of 2^-127 is subnormal where its products are not.
#pragma once
#include <cfenv>

namespace microscale {

class StandardFloats {
 public:
  StandardFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardFloats() { std::fesetenv(&before_); }
  StandardFloats(const StandardFloats &) = delete;
  StandardFloats &operator=(const StandardFloats &) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace microscale
