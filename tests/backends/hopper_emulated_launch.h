// Behind `hopper_wide.cu`: its programs on a CPU, see `hopper_emulated.h`.
static const Given *argument_;
static void run_fiber() {
  wide(*argument_);
  done_[threadIdx.x] = true;
  progress_++;
  give_way();
}

// All programs, one after the other. 0; 1 if threads wait for ever, 2 if one reads too early.
extern "C" int emulate(const Given *given, u32 programs, u32 threads) {
  constexpr size_t kStack = 128 << 10;
  argument_ = given;
  early_ = false;
  gridDim.x = programs;
  blockDim.x = threads;
  for (u32 program = 0; program < programs; program++) {
    blockIdx.x = program;
    left_ = program + 1 < programs ? 3 + 2 * program : 1 << 30;
    meetings_.clear();
    barriers_.clear();
    std::memset(raw, 0xFF, sizeof raw);  // NaN
    fibers_.assign(threads, {});
    stacks_.resize(threads * kStack);
    done_.assign(threads, false);
    std::fill(std::begin(waited_), std::end(waited_), false);
    for (u32 i = 0; i < threads; i++) {
      getcontext(&fibers_[i]);
      fibers_[i].uc_stack = {stacks_.data() + i * kStack, 0, kStack};
      fibers_[i].uc_link = nullptr;
      makecontext(&fibers_[i], run_fiber, 0);
    }
    // Of each program another group of warps is late: it goes on where the others wait for it, and no sooner.
    const u32 late = (program + 1) % (threads / 128);
    bool all = false;
    for (;;) {
      const u64 before = progress_;
      bool left = false;
      for (u32 i = 0; i < threads; i++)
        if (!done_[i]) {
          left = true;
          threadIdx.x = i;
          if (all || i / 128 != late) swapcontext(&scheduler_, &fibers_[i]);
        }
      if (!left) break;
      if (all && progress_ == before) return 1;
      all = progress_ == before;
    }
  }
  return early_ ? 2 : 0;
}
