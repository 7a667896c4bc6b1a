// Pages of 2 MiB where the system has them: a stream of weights then misses the TLB 512 times less often.
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace microscale {

constexpr size_t kLargePage = size_t{2} << 20;

// Asks for them for the whole pages among `bytes` bytes that nobody has touched yet. A wish: nothing depends on it.
inline void use_large_pages(void *from, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto start = (reinterpret_cast<uintptr_t>(from) + kLargePage - 1) / kLargePage * kLargePage;
  const auto end = (reinterpret_cast<uintptr_t>(from) + bytes) / kLargePage * kLargePage;
  if (start < end) madvise(reinterpret_cast<void *>(start), end - start, MADV_HUGEPAGE);
#else
  (void)from, (void)bytes;
#endif
}

}  // namespace microscale
