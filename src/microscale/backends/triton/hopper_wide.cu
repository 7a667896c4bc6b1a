// Products of many tokens on Hopper: one group of four warps copies tokens and codes into shared memory, two to four
// others decode 64 to 192 rows of weights each into registers and multiply. `hopper_text.py` writes the constants in
// capitals, `decode_group` and `Product` above this text; `hopper_ptx.h`, `hopper_rows.h`, `hopper_unit.h`,
// `hopper_steps.h`, `hopper_codes.h`, `hopper_wide_loop.h` or `hopper_turns.h`, and `hopper_tiles.h` come before it.
//
// A program stays on its multiprocessor and takes units: TILES of 64 rows times one tile of at most MOST tokens, whose
// number is fitted to what is there: one of SIZES. No barrier holds the groups together: the one that copies runs
// ahead, also into the next unit, and while one group decodes, activates or stores, another multiplies.
//
// Both products of experts are one list, from which programs claim: a unit of w2 waits until its tokens are done with
// w13, and whoever has claimed that runs and waits for nobody. A linear is `hopper_linear.cu`'s.

constexpr int kUnrolled =
    4;  // steps whose addresses are constants apart: a new one waits until the last copy has read it

// N tokens, 16 at a time, and the weights of all groups, E tiles each, all columns.
template <int N, int E>
DEVICE void copy_unit(const Given &a, Ring &r, const Tile &t) {
  const Operands &o = operands(a, t);
  const int piece = threadIdx.x % 8, token = threadIdx.x / 8;
  const u32 copy_at = token * 128 + ((piece ^ (token % 8)) << 4);
  // Where each token's 16 bytes of the first step lie. Those past the end repeat the last.
  constexpr int kCopies = (N + 15) / 16;
  u32 which[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; j++) which[j] = t.start + min(token + 16 * j, t.count - 1);
  if (t.product == 0)
#pragma unroll
    for (int j = 0; j < kCopies; j++) which[j] = static_cast<u32>(route_at(a, which[j])) / TOP_K;
  u64 x[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; j++) {
    x[j] = o.x + static_cast<u64>(which[j]) * static_cast<u32>(o.columns * 2) + 16 * piece;
    unknown(x[j]);
  }
  CodesAhead<E> codes = codes_of<E>(a, t);
  Pieces<E, kTileScales> scales = pieces_of<E, kTileScales>(a, t, o.scales);
  const int chunks = o.chunks;
#pragma unroll 1
  for (int done = 0; done < chunks; done += kUnrolled) {
#pragma unroll
    for (int s = 0; s < kUnrolled; s++) {
      if (done + s >= chunks) break;
      barrier_wait(r.bar + kEmpty, r.parity);
      bring_codes(codes, r, s);
      bring(scales, r.stage + kScales, s);
      const int bytes = EVEN || (done + s) * 64 + piece * 8 < o.columns ? 16 : 0;
#pragma unroll
      for (int j = 0; j < kCopies; j++) copy16(r.stage + copy_at + j * 2048, x[j] + s * 128, bytes);
      barrier_arrive_copied(r.bar);
      advance(r);
    }
#pragma unroll
    for (int j = 0; j < kCopies; j++) x[j] += kUnrolled * 128;
    go(codes, kUnrolled * kTile);
    go(scales, kUnrolled * kTileScales);
  }
  for (int done = chunks; done % kTurn; done++) {  // the rest of a turn, in which nothing comes
    barrier_wait(r.bar + kEmpty, r.parity);
    bring_none(r);
    barrier_arrive(r.bar);
    advance(r);
  }
}

template <int E>
DEVICE void copy_tiles(const Given &a, Ring &r, const Tile &t) {
  switch (rounded(t.count)) {
#define COPY(n) \
  case n: copy_unit<n, E>(a, r, t); break;
    EACH_SIZE(COPY)
  }
}

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
    if (kFewer && t.each == kFewer)
      copy_tiles<kFewer ? kFewer : EACH>(a, r, t);
    else
      copy_tiles<EACH>(a, r, t);
  }
  copies_wait();
}

// The steps of a group that has no rows in a unit, in whole turns.
DEVICE void leave_out(const Given &a, const Tile &t, Ring &r) {
  const int chunks = (operands(a, t).chunks + kTurn - 1) / kTurn * kTurn;
  for (int step = 0; step < chunks; step++) {
    pass_step(r.bar, r.parity, threadIdx.x % 32 == 0);
    advance(r);
  }
}

// A group is done with a unit of w13.
DEVICE void tell(const Given &a, const Tile &t, int side) {
  meet(side);
  if (threadIdx.x % 128 == 0) add_one(tile_done(a.progress, t.tile));
}

// A use that never comes, behind all loops: without it ptxas gives the loop of every size registers of its own for
// decoded weights, and if these are too few, lets products wait for one another.
DEVICE void never_reached(const Decoded &pairs, const Tile &t) {
  if (t.count >= 0) return;
#pragma unroll
  for (const auto &some : pairs)
#pragma unroll
    for (u32 v : some) needs(v);
}

template <int E>
DEVICE void multiply_tiles(Sums &d, Decoded &pairs, const Given &a, const Tile &t, int side, Ring &r) {
  switch (rounded(t.count)) {
#define MULTIPLY(n) \
  case n: multiply<n, E>(d, pairs, a, t, side, r); break;
    EACH_SIZE(MULTIPLY)
  }
}

DEVICE void use_unit(const Given &a, const Tile &t, int side, Ring &r, int *routes, float *shares) {
  constexpr int kRounds = (MOST + 127) / 128;
  const int thread = threadIdx.x % 128;
  Sums d;  // the first products are not added to it
  Route route[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; i++) route[i] = route_of(a, t, thread + 128 * i);
  Decoded pairs;
  if (kFewer && t.each == kFewer)
    multiply_tiles<kFewer ? kFewer : EACH>(d, pairs, a, t, side, r);
  else
    multiply_tiles<EACH>(d, pairs, a, t, side, r);
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < MOST / 2; i++) not_before(d[e][i]);
  never_reached(pairs, t);
  if (t.product == 0) {
    store<kFirst>(d, a, t, side, routes, shares);
    tell(a, t, side);
  } else {
#pragma unroll
    for (int i = 0; i < kRounds; i++)
      if (thread + 128 * i < MOST) routes[thread + 128 * i] = route[i].to, shares[thread + 128 * i] = route[i].share;
    meet(side);
    store<kSecond>(d, a, t, side, routes, shares);
  }
}

// All groups but the first.
DEVICE void use(const Given &a, Ring r, Units n, int (*routes)[USERS][MOST], float (*shares)[USERS][MOST]) {
  const int side = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  Tile t = next_unit(n);
  // Groups begin one after the other, and so they end: the matrix unit is never without one.
  constexpr int kApart = USERS == 2 ? STAGES / 2 : 1;
  if (t.expert >= 0) barrier_wait(r.full + min(side * kApart, operands(a, t).chunks - 1) * 8, 0);
  for (int turn = 0; t.expert >= 0; t = next_unit(n)) {
    if (row_tile(a, t, side * t.each) * results_of(t) >= operands(a, t).width) {
      leave_out(a, t, r);
      if (t.product == 0) tell(a, t, side);
      continue;
    }
    use_unit(a, t, side, r, routes[turn][side], shares[turn][side]);
    turn ^= 1;
  }
}

extern "C" __global__ void __launch_bounds__(128 + 128 * USERS, 1) KERNEL(const __grid_constant__ Given a) {
  DYNAMIC_SHARED(raw);
  __shared__ u64 bars[2 * STAGES + kUnits];
  __shared__ Tile tiles[kUnits];
  __shared__ int routes[2][USERS][MOST];
  __shared__ __align__(8) float shares[2][USERS][MOST];
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
    use(a, r, n, routes, shares);
  }
}
