// A pool of threads that hands out units one by one, so that nobody waits for a thread that has not started. Units go
// round among threads, and each takes its own first: so it is known what a thread reads next, and can be fetched ahead.
// Who has none left takes over the later half of what somebody has left.
//
// When parallel() returns, the job's context is gone. The gate keeps late threads away from it: a worker
// looks at the job only after it has counted itself in through an open gate, and the caller closes the gate
// before it waits for those inside. A worker that wakes later finds the gate closed, or open for a newer job,
// which it may join.
#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "floats.h"

namespace microscale {
namespace {

using Clock = std::chrono::steady_clock;

// As long as the gaps between the operators of one layer, so that a model's next call mostly finds its
// workers awake; short enough that other programs on the core lose little.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kMaxThreads = 1024;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#ifdef __linux__
void sleep_while(std::atomic<uint32_t> &word, uint32_t value) {
  static_assert(sizeof word == 4);
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);  // callers expect early returns
}
void wake_one(std::atomic<uint32_t> &word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0); }
#else
void sleep_while(std::atomic<uint32_t> &word, uint32_t value) { word.wait(value); }
void wake_one(std::atomic<uint32_t> &word) { word.notify_one(); }
#endif

// Spins until `done`, but not beyond `deadline`. Returns whether it is done.
template <class Done>
bool spin(Clock::time_point deadline, Done done) {
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < deadline);
  return false;
}

struct alignas(64) Worker {
  std::atomic<uint32_t> asleep{0};  // 1 while it wants to be woken
  uint32_t seen = 0;                // the last epoch it looked at
  int thread = 0;
};

// Units that are left of those which are every threads-th from number `lane` on: the first of them, and behind the
// last.
struct Left {
  static constexpr int kBits = 27, kLaneBits = 10;
  static_assert(kMaxThreads <= 1 << kLaneBits);
  uint64_t lane, first, end;

  explicit Left(uint64_t word)
      : lane(word >> 2 * kBits), first(word >> kBits & ((1 << kBits) - 1)), end(word & ((1 << kBits) - 1)) {}
  Left(uint64_t of, uint64_t from, uint64_t to) : lane(of), first(from), end(to) {}
  uint64_t word() const { return lane << 2 * kBits | first << kBits | end; }
  uint64_t count() const { return first < end ? end - first : 0; }
};

// What a thread takes its units from, and who has none left a half of. A range that was used up never comes back, so a
// word that is still the same has not changed.
struct alignas(64) Share {
  std::atomic<uint64_t> word{0};

  // The first unit, or else the later half with at least one, in `taken`. False: there is none.
  bool take(bool half, Left &taken) {
    uint64_t before = word.load(std::memory_order_relaxed);
    for (;;) {
      Left rest(before);
      if (rest.count() == 0) return false;
      taken = rest;
      if (half)
        rest.end = taken.first = rest.first + rest.count() / 2;
      else
        rest.first = taken.end = rest.first + 1;
      if (word.compare_exchange_weak(before, rest.word(), std::memory_order_relaxed)) return true;
    }
  }
  uint64_t count() const { return Left(word.load(std::memory_order_relaxed)).count(); }
};

struct Job {
  int threads;
  int64_t units;
  void (*run)(void *context, int64_t unit, int thread);
  void *context;
};

class Pool {
 public:
  void run(const Job &wanted);

 private:
  static constexpr uint32_t kOpen = 1u << 31, kCallerSleeps = 1u << 30, kInside = kCallerSleeps - 1;

  static void *main(void *worker);
  void hire(int threads);
  void await_epoch(Worker &me, Clock::time_point deadline);
  bool enter();
  void leave();
  void work(int thread);
  bool take(int thread, int64_t &unit);
  void wait_until_empty();

  std::mutex callers_;
  Job job_{};  // written while the gate is closed and nobody is inside
  int hired_ = 0;

  alignas(64) std::atomic<uint32_t> epoch_{0};  // one more for every job: what idle workers watch
  alignas(64) std::atomic<uint32_t> gate_{0};   // kOpen, kCallerSleeps, and how many workers are inside
  alignas(64) std::atomic<int> next_wake_{0};
  Share shares_[kMaxThreads];
  Worker workers_[kMaxThreads];
};

// Never destroyed: workers may still look at it while the process exits.
Pool *const pool = [] {
  // The child of a fork has none of the threads. It starts over, in the same place because it may not
  // allocate; what the lock and the gate were in the parent at that moment does not matter to it.
  pthread_atfork(nullptr, nullptr, [] { new (pool) Pool; });
  return new Pool;
}();

void Pool::run(const Job &wanted) {
  const std::lock_guard lock(callers_);
  hire(wanted.threads);
  job_ = wanted;
  for (int i = 0; i < wanted.threads; ++i) {
    const auto count = static_cast<uint64_t>((wanted.units - i + wanted.threads - 1) / wanted.threads);
    shares_[i].word.store(Left(static_cast<uint64_t>(i), 0, count).word(), std::memory_order_relaxed);
  }
  // A worker may pass the gate before the epoch is new. It must not wake others yet: they would sleep on.
  next_wake_.store(kMaxThreads, std::memory_order_relaxed);
  gate_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1);  // sequentially consistent with `asleep`: the worker sees this or is seen asleep
  next_wake_.store(1, std::memory_order_release);
  work(0);
  wait_until_empty();
}

// Has workers for `threads`, or as many as the system grants.
void Pool::hire(int threads) {
  while (hired_ + 1 < threads) {
    Worker &worker = workers_[hired_ + 1];
    worker.seen = epoch_.load(std::memory_order_relaxed);
    worker.thread = hired_ + 1;
    pthread_attr_t detached;
    if (pthread_attr_init(&detached) != 0) return;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t handle;
    const int error = pthread_create(&handle, &detached, main, &worker);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&detached);
    if (error != 0) return;
    ++hired_;
  }
}

void *Pool::main(void *worker) {
#ifdef __linux__
  pthread_setname_np(pthread_self(), "microscale");
#endif
  const StandardFloats floats;  // not those of the thread that hired it
  Worker &me = *static_cast<Worker *>(worker);
  Pool &self = *pool;
  Clock::time_point deadline = Clock::now() + kSpin;
  for (;;) {
    self.await_epoch(me, deadline);
    if (!self.enter()) continue;
    const bool invited = me.thread < self.job_.threads;
    if (invited) self.work(me.thread);
    self.leave();
    // Only work earns another spin: the workers beyond a smaller job's threads go to sleep.
    if (invited) deadline = Clock::now() + kSpin;
  }
  return nullptr;
}

void Pool::await_epoch(Worker &me, Clock::time_point deadline) {
  const auto changed = [&] { return epoch_.load() != me.seen; };
  while (!spin(deadline, changed)) {
    me.asleep.store(1);
    if (!changed()) sleep_while(me.asleep, 1);
    me.asleep.store(0);
  }
  me.seen = epoch_.load();
}

bool Pool::enter() {
  uint32_t gate = gate_.load(std::memory_order_relaxed);
  while ((gate & kOpen) != 0) {
    if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) return true;
  }
  return false;
}

void Pool::leave() {
  if (gate_.fetch_sub(1, std::memory_order_acq_rel) == (kCallerSleeps | 1)) wake_one(gate_);
}

void Pool::work(int thread) {
  // Everybody who is awake wakes others first, so that it takes the caller few system calls to start many.
  const int threads = job_.threads;
  for (int i; (i = next_wake_.fetch_add(1, std::memory_order_acq_rel)) < threads;) {
    Worker &worker = workers_[i];
    if (worker.asleep.load() == 1 && worker.asleep.exchange(0) == 1) wake_one(worker.asleep);
  }
  for (int64_t unit; take(thread, unit);) job_.run(job_.context, unit, thread);
}

bool Pool::take(int thread, int64_t &unit) {
  const int threads = job_.threads;
  Left taken(0);
  while (!shares_[thread].take(false, taken)) {
    int from = thread;
    uint64_t most = 0;
    for (int i = 0; i < threads; ++i)
      if (const uint64_t count = shares_[i].count(); count > most) from = i, most = count;
    if (most == 0) return false;
    if (shares_[from].take(true, taken)) shares_[thread].word.store(taken.word(), std::memory_order_relaxed);
  }
  unit = static_cast<int64_t>(taken.first) * threads + static_cast<int64_t>(taken.lane);
  return true;
}

void Pool::wait_until_empty() {
  uint32_t gate = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  const auto empty = [&] { return ((gate = gate_.load(std::memory_order_acquire)) & kInside) == 0; };
  if (gate == 0 || spin(Clock::now() + kSpin, empty)) return;
  gate_.fetch_or(kCallerSleeps, std::memory_order_acq_rel);
  while (!empty()) sleep_while(gate_, gate);
  gate_.store(0, std::memory_order_relaxed);
}

}  // namespace

void parallel(int threads, int64_t units, void (*run)(void *context, int64_t unit, int thread), void *context) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads > units) threads = static_cast<int>(units);
  if (threads <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(context, unit, 0);
    return;
  }
  pool->run({threads, units, run, context});
}

}  // namespace microscale
