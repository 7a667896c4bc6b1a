// The thread pool: each unit once, nobody late, forks, several callers.
//
// From csrc, once with -fsanitize=address,undefined and once with -fsanitize=thread:
//   g++ -std=c++20 -g -O1 -fsanitize=thread -Wall -Wextra -I. -pthread tests/test_parallel.cc parallel.cc
//       -o test_parallel
#include "parallel.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"

#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;
using microscale::parallel;

// What one call did. The counts are plain integers: parallel() must order them against its return.
struct Call {
  explicit Call(int t, int64_t n) : threads(t), hits(static_cast<size_t>(n)), inside(static_cast<size_t>(t)) {}

  int threads;
  std::vector<int> hits;
  std::vector<std::atomic<int>> inside;  // by thread index: two at once must not share one
  std::atomic<bool> bad_index{false}, shared_index{false};
  std::atomic<bool> over{false}, late{false};
  std::chrono::microseconds pace{0};

  static void unit(void *context, int64_t unit, int thread) {
    Call &call = *static_cast<Call *>(context);
    if (call.over) call.late = true;
    if (thread < 0 || thread >= call.threads) {
      call.bad_index = true;
      return;
    }
    std::atomic<int> &inside = call.inside[static_cast<size_t>(thread)];
    if (inside.fetch_add(1) != 0) call.shared_index = true;
    if (call.pace.count() != 0) std::this_thread::sleep_for(call.pace);
    ++call.hits[static_cast<size_t>(unit)];
    inside.fetch_sub(1);
  }
  bool run() {
    parallel(threads, static_cast<int64_t>(hits.size()), unit, this);
    over = true;
    for (int hit : hits) {
      if (hit != 1) return false;
    }
    return !bad_index && !shared_index && !late;
  }
};

void test_once_each() {
  for (int threads : {1, 2, 3, 4, 8}) {
    for (int64_t units : {0, 1, 2, 3, 7, 8, 100, 5000}) {
      CHECK_IN(Call(threads, units).run(), "threads %d units %ld", threads, long(units));
    }
  }
  for (int threads : {0, -1, INT32_MIN}) {
    int64_t sum = 0;
    parallel(threads, 5, [](void *s, int64_t unit, int) { *static_cast<int64_t *>(s) += unit; }, &sum);
    CHECK(sum == 10);
  }
  Call none(1, 1);
  parallel(4, -3, Call::unit, &none);
  CHECK(none.hits[0] == 0);
}

// A thread takes its own units first, in ascending order and without a gap, and then others'.
void test_own_first() {
  struct Seen {
    int64_t next[4] = {0, 1, 2, 3};
    bool done[4] = {};
    std::atomic<bool> bad{false};
  } seen;
  parallel(
      4, 10000,
      [](void *context, int64_t unit, int thread) {
        Seen &s = *static_cast<Seen *>(context);
        if (unit % 4 != thread) {
          s.done[thread] = true;
          return;
        }
        if (s.done[thread] || unit != s.next[thread]) s.bad = true;
        s.next[thread] = unit + 4;
      },
      &seen);
  CHECK(!seen.bad);
}

// A thread that is held up in a unit keeps that one alone.
void test_takes_from_others() {
  struct Held {
    std::atomic<int> rest{0};
    std::atomic<bool> late{false};
  } held;
  parallel(
      2, 100,
      [](void *context, int64_t unit, int) {
        Held &h = *static_cast<Held *>(context);
        if (unit != 0) {
          ++h.rest;
          return;
        }
        const auto deadline = Clock::now() + 10s;
        while (h.rest < 99 && Clock::now() < deadline) std::this_thread::sleep_for(1ms);
        h.late = h.rest < 99;
      },
      &held);
  CHECK(!held.late);
}

// Several threads really take part, and one index belongs to one thread throughout a call.
void test_takes_part() {
  struct Who {
    std::thread::id ids[3] = {};
    std::atomic<bool> bad{false};
  } who;
  parallel(
      3, 60,
      [](void *context, int64_t, int thread) {
        Who &w = *static_cast<Who *>(context);
        if (w.ids[thread] != std::thread::id() && w.ids[thread] != std::this_thread::get_id()) w.bad = true;
        w.ids[thread] = std::this_thread::get_id();
        std::this_thread::sleep_for(2ms);
      },
      &who);
  CHECK(!who.bad);
  CHECK(who.ids[0] == std::this_thread::get_id());
  for (int i = 1; i < 3; ++i) CHECK(who.ids[i] != std::thread::id() && who.ids[i] != who.ids[0]);
  CHECK(who.ids[1] != who.ids[2]);
}

// The work must not depend on workers that are asleep or late.
void test_small_calls() {
  bool ok = true;
  for (int i = 0; i < 3000; ++i) ok &= Call(2 + i % 3, 1 + i % 5).run();
  for (int i = 0; i < 200; ++i) {
    ok &= Call(2 + i % 3, 3).run();
    std::this_thread::sleep_for(i % 2 ? 200us : 20us);
  }
  CHECK(ok);
}

// Contexts die right after the call, so that the sanitizers see a worker that comes late.
void test_short_lived() {
  bool ok = true;
  const auto end = Clock::now() + 400ms;
  while (Clock::now() < end) {
    for (int i = 0; i < 50; ++i) ok &= std::make_unique<Call>(4, 2 + i % 4)->run();
    std::this_thread::sleep_for(60us);  // about as long as they spin, so that many are just falling asleep
  }
  CHECK(ok);
}

// The caller waits for a slow last unit long enough to sleep.
void test_slow_units() {
  Call call(3, 7);
  call.pace = 3ms;
  CHECK(call.run());
}

// Idle workers sleep.
void test_idle() {
  CHECK(Call(8, 100).run());
  std::this_thread::sleep_for(5ms);
  const std::clock_t start = std::clock();
  std::this_thread::sleep_for(60ms);
  CHECK(std::clock() - start < CLOCKS_PER_SEC / 50);
}

void test_many_callers() {
  std::atomic<bool> ok{true};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&ok, c] {
      std::mt19937 random(static_cast<unsigned>(c));
      const auto end = Clock::now() + 500ms;
      while (Clock::now() < end) {
        if (!Call(1 + static_cast<int>(random() % 5), static_cast<int64_t>(random() % 40)).run()) ok = false;
      }
    });
  }
  for (auto &caller : callers) caller.join();
  CHECK(ok);
}

// Whether a forked child can compute and exit within two seconds.
bool child_works() {
  const pid_t child = fork();
  if (child == 0) {
    bool ok = true;
    for (int i = 0; i < 20; ++i) ok &= Call(2 + i % 3, 50).run();
    _exit(ok ? 0 : 1);
  }
  const auto end = Clock::now() + 2s;
  int status = -1;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (Clock::now() > end) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      return false;
    }
    std::this_thread::sleep_for(200us);
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void test_fork() {
  CHECK(Call(3, 100).run());
  CHECK(child_works());
  CHECK(Call(3, 100).run());
}

// While other threads are in parallel(), at any point of it.
void test_fork_beside_callers() {
  std::atomic<bool> stop{false}, ok{true};
  std::vector<std::thread> callers;
  for (int c = 0; c < 2; ++c) {
    callers.emplace_back([&] {
      while (!stop) {
        if (!Call(3, 20).run()) ok = false;
      }
    });
  }
  for (int i = 0; i < 30; ++i) {
    if (!CHECK(child_works())) break;
  }
  stop = true;
  for (auto &caller : callers) caller.join();
  CHECK(ok);
}

// The process ends while workers spin or sleep: exit() must neither hang nor crash.
void test_exit() {
  for (auto idle : {0us, 30us, 2000us}) {
    const pid_t child = fork();
    if (child == 0) {
      Call(3, 20).run();
      std::this_thread::sleep_for(idle);
      std::fflush(stdout);
      exit(7);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
  }
}

// What a call of two units that take 20 us each takes beyond these 20, after `idle`; in us.
double overhead(std::chrono::microseconds idle, int calls) {
  static constexpr auto kWork = 20us;
  std::vector<double> extra;
  for (int i = 0; i < calls; ++i) {
    if (idle.count() != 0) std::this_thread::sleep_for(idle);
    const auto start = Clock::now();
    parallel(
        2, 2,
        [](void *, int64_t, int) {
          for (const auto end = Clock::now() + kWork; Clock::now() < end;) continue;
        },
        nullptr);
    extra.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start - kWork).count());
  }
  std::sort(extra.begin(), extra.end());
  return extra[extra.size() / 2];
}

}  // namespace

int main() {
  test_once_each();
  test_own_first();
  test_takes_from_others();
  test_takes_part();
  test_small_calls();
  test_short_lived();
  test_slow_units();
  test_idle();
  test_many_callers();
  // ThreadSanitizer does not follow threads into a forked child. AddressSanitizer's own locks are not fit for
  // a fork beside busy threads, nor its leak check for exit() in a child.
  if (!kThreadSanitizer) test_fork();
  if (!kThreadSanitizer && !kAddressSanitizer) test_fork_beside_callers(), test_exit();
  std::printf("median overhead of a call: %.2f us back to back, %.1f us after 5 ms of idleness\n", overhead(0us, 1000),
              overhead(5ms, 50));
  return check::finish("test_parallel");
}
