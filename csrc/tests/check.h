// The smallest test framework that serves: CHECK counts and prints, finish() is main's result.
#pragma once
#include <atomic>
#include <cstdio>

namespace check {

inline std::atomic<int> failures{0};
inline std::atomic<long> checks{0};

inline bool that(bool ok, const char *text, const char *file, int line) {
  ++checks;
  if (!ok && ++failures <= 20) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
  return ok;
}

inline int finish(const char *name) {
  const int failed = failures;
  std::printf("%s: %ld checks, %d failed\n", name, checks.load(), failed);
  return failed == 0 && checks > 0 ? 0 : 1;
}

}  // namespace check

// Evaluates to whether it held.
#define CHECK(condition) check::that((condition), #condition, __FILE__, __LINE__)

// With a printf format and its arguments, which say where it failed.
#define CHECK_IN(condition, ...)                      \
  do {                                                \
    if (!CHECK(condition) && check::failures <= 20) { \
      std::fprintf(stderr, "  with " __VA_ARGS__);    \
      std::fputc('\n', stderr);                       \
    }                                                 \
  } while (0)
