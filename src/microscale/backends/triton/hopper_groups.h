// How the groups of warps of `hopper_wide.cu` and `hopper_fp8.cu` go through units: one copies, the others multiply.
// Either text comes before it, with `copy_unit`, `takes_part` and `use_unit`.

// The next unit, for all threads that copy, and for those that multiply. `claimed`: of experts what the first thread
// has claimed, one ahead, so that it need not wait for the number.
DEVICE Tile publish(const Given &a, Units &n, int &claimed) {
  const int slot = n.slot;
  if (threadIdx.x == 0) {
    n.tiles[slot] = experts_unit(a, claimed);
    barrier_arrive(n.bars + slot * 8);
    claimed = claim(a.progress);
  }
  meet(USERS);
  advance(n);
  return n.tiles[slot];
}

// The first group of warps; `claimed`: as `publish` has it.
DEVICE void copy(const Given &a, Ring r, Units n, int claimed) {
  r.parity = 1;
  for (;;) {
    const Tile t = publish(a, n, claimed);
    if (t.expert < 0) break;
    if (t.product == 1) wait_until(tile_done(a.progress, t.tile), a.of[0].blocks * USERS);
    copy_unit(a, r, t);
  }
  copies_wait();
}

// The steps of a group that has no part in a unit, in whole turns.
DEVICE void leave_out(const Given &a, const Tile &t, Ring &r) {
  const int chunks = (operands(a, t).chunks + kTurn - 1) / kTurn * kTurn;
  for (int step = 0; step < chunks; step++) {
    pass_step(r.bar, r.parity, threadIdx.x % 32 == 0);
    advance(r);
  }
}

// All groups but the first.
DEVICE void use(const Given &a, Ring r, Units n) {
  const int side = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  Tile t = next_unit(n);
  // Groups begin one after the other, and so they end: the matrix unit is never without one.
  constexpr int kApart = FP8 ? STAGES - 1 : USERS == 2 ? STAGES / 2 : 1;
  if (t.expert >= 0) barrier_wait(r.full + min(side * kApart, operands(a, t).chunks - 1) * 8, 0);
  for (int turn = 0; t.expert >= 0; t = next_unit(n)) {
    if (!takes_part(a, t, side)) {
      leave_out(a, t, r);
      if (t.product == 0) tell(a, t, side);
      continue;
    }
    use_unit(a, t, side, turn, r);
    turn ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(128 + 128 * USERS, 1) KERNEL(const __grid_constant__ Given a) {
  DYNAMIC_SHARED(raw);
  __shared__ u64 bars[2 * STAGES + kUnits];
  __shared__ Tile tiles[kUnits];
  Ring r;
  // By way of a shuffle: addresses that the compiler knows it works out again for every use, slowly.
  r.stage = r.first = __shfl_sync(~0u, (shared_address(raw) + 1023) & ~1023u, 0);
  r.bar = r.full = __shfl_sync(~0u, shared_address(bars), 0);
  r.parity = 0;
  const Units n = {tiles, r.full + 2 * kEmpty, 0, 0};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(r.full + 8 * i, 128 + kAskers);       // every copying thread
      barrier_init(r.full + kEmpty + 8 * i, 4 * USERS);  // every other warp
    }
    for (int i = 0; i < kUnits; i++) barrier_init(n.bars + 8 * i, 1);
    barriers_are_there();
  }
  __syncthreads();
  wait_ahead();  // weights and biases may be new, too
  // Takes as long as to find tiles.
  const int claimed = threadIdx.x == 0 ? claim(a.progress) : 0;
  find(a);
  if (threadIdx.x < 128) {
    fewer_registers<COPY_REGISTERS>();
    copy(a, r, n, claimed);
  } else {
    more_registers<USE_REGISTERS>();
    use(a, r, n);
  }
}
