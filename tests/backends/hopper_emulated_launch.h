// Behind a kernel's text: its programs on a CPU, see `hopper_emulated.h`.
static const Given *argument_;
static void run_fiber() {
  KERNEL(*argument_);
  done_[threadIdx.x] = true;
  progress_++;
  give_way();
}

// What the text keeps in shared memory besides; the linker says where.
extern "C" __attribute__((visibility("hidden"))) u8 __start_shared_memory[], __stop_shared_memory[];

// All programs, one after the other. 0; 1 if threads wait for ever, 2 if one reads too early, 3 if one has something
// copied that copies do not see yet, 4 if a box of tokens reaches past the last one. `groups`: of 128 threads that
// belong together; behind these each warp has a task of its own. `seed`: who is late in the first program, plus 64
// times which lanes are, and 4096 where copies are.
extern "C" int emulate(const Given *given, u32 programs, u32 threads, u32 groups, u32 seed) {
  constexpr size_t kStack = 128 << 10;
  const auto task = [=](u32 thread) {
    return thread < 128 * groups ? thread / 128 : groups + (thread - 128 * groups) / 32;
  };
  argument_ = given;
  early_ = blind_ = past_ = false;
  stored_.clear();
  gridDim.x = programs;
  blockDim.x = threads;
  for (u32 program = 0; program < programs; program++) {
    blockIdx.x = program;
    left_ = program + 1 < programs ? 3 + 2 * program : 1 << 30;
    meetings_.clear();
    barriers_.clear();
    std::memset(raw, 0xFF, sizeof raw);  // NaN
    std::memset(__start_shared_memory, 0xFF, __stop_shared_memory - __start_shared_memory);
    fibers_.assign(threads, {});
    stacks_.resize(threads * kStack);
    done_.assign(threads, false);
    std::fill(std::begin(waited_), std::end(waited_), false);
    std::fill(std::begin(unseen_), std::end(unseen_), false);
    std::fill(std::begin(ready_), std::end(ready_), nullptr);
    for (u32 i = 0; i < threads; i++) {
      getcontext(&fibers_[i]);
      fibers_[i].uc_stack = {stacks_.data() + i * kStack, 0, kStack};
      fibers_[i].uc_link = nullptr;
      makecontext(&fibers_[i], run_fiber, 0);
    }
    // Of each program others are late, all of them or one lane of each warp: they go on where the rest waits for them,
    // and no sooner. Lanes go on in another order every time. Texts of groups alone leave it to their products to keep
    // lanes together, which happen too late here for that.
    const bool lanes = 128 * groups < threads;
    const u32 late = (seed + program) % (task(threads - 1) + 1),
              lane = lanes ? (seed / 64 + 32 + 7 * program) % 64 : 32;
    const auto is_late = [=](u32 thread) { return task(thread) == late && (lane >= 32 || thread % 32 == lane); };
    copies_.clear();
    engine_late_ = (seed / 4096 + program) % 2;
    bool all = false;
    for (u32 start = 0;; start = (start + (lanes ? 37 : 0)) % threads) {
      const u64 before = progress_;
      bool left = false;
      for (u32 k = 0; k < threads; k++) {
        const u32 i = (start + k) % threads;
        if (done_[i]) continue;
        left = true;
        threadIdx.x = i;
        if (is_late(i) && !all || ready_[i] && !ready_[i]()) continue;
        swapcontext(&scheduler_, &fibers_[i]);
      }
      if (!left) break;
      const bool waiting = progress_ == before;
      if (waiting && !copies_.empty()) {
        const auto copy = std::move(copies_.back());
        copies_.pop_back();
        copy();
      } else if (waiting && all) {
        return 1;
      } else {
        all = waiting;
      }
    }
  }
  return early_ ? 2 : blind_ ? 3 : past_ ? 4 : 0;
}
