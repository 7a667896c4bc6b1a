// Linears of many tokens on Hopper: one thread has tokens and codes copied into shared memory, and one to three groups
// of four warps decode 64 or 128 rows of weights each into registers and multiply. `hopper_text.py` writes the
// constants in capitals, `decode_group` and `Product` above this text; `hopper_ptx.h`, `hopper_rows.h`,
// `hopper_linear.h` and `hopper_steps.h` come before.
//
// A program stays on its multiprocessor and takes every gridDim-th unit: TILES of 64 rows times MOST tokens. What full
// units leave of the tokens may be another kind's: fewer tokens, and more tiles, for programs that have a unit less. No
// barrier holds the groups together: who copies runs ahead, also into the next unit, and while one group decodes or
// stores, another multiplies. Copies are whole boxes of tokens and whole tiles of codes, which arrive as products read:
// nobody spends instructions on them, or on a fence, where those of decoding are what small products wait for.

constexpr int kEarly = 16;  // steps whose codes come nearer while the kernel ahead still runs

// A tile of a unit's weights, or the last one.
template <typename K>
DEVICE int tile_there(const Given &a, const Tile &t, int i) {
  return min(tile_of<K>(t, 0, i), a.tiles - 1);
}

// All columns of a unit.
template <typename K>
DEVICE void copy_unit(const Given &a, Ring &r, const Tile &t) {
  constexpr int tiles = K::kTiles, codes = codes_behind(K::kTokens), scales = scales_behind(K::kTokens, tiles);
  const void *box = box_of<K>(a, t);
  u32 at[tiles];  // in tiles and steps
#pragma unroll
  for (int i = 0; i < tiles; i++) at[i] = tile_there<K>(a, t, i) * a.chunks;
#pragma unroll 1
  for (int column = 0; column < 64 * a.chunks; column += 64) {
    barrier_wait(r.bar + kEmpty, r.parity);
    barrier_expect(r.bar, t.count * 128 + tiles * (kTile + kTileScales));
    copy_box(r.stage, box, column, t.start, r.bar);
#pragma unroll
    for (int i = 0; i < tiles; i++) {
      copy_bytes(r.stage + codes + i * kTile, a.codes + u64{at[i]} * kTile, kTile, r.bar);
      copy_bytes(r.stage + scales + i * kTileScales, a.scales + u64{at[i]} * kTileScales, kTileScales, r.bar);
      at[i]++;
    }
    advance(r);
  }
}

// The first steps of a program's first unit to come nearer.
template <typename K>
DEVICE void fetch(const Given &a, const Tile &t) {
  if (threadIdx.x == 127) fetch_map(box_of<K>(a, t));
  if (threadIdx.x < K::kTiles) {
    const u32 first = tile_there<K>(a, t, threadIdx.x) * a.chunks;
    fetch_bytes(a.codes + u64{first} * kTile, min(a.chunks, kEarly) * kTile);
  }
}

// The first group of warps, of which one thread copies.
DEVICE void copy(const Given &a, Ring r, Units n) {
  const Tile begin = unit(a, blockIdx.x);
  of_kind(begin, [&](auto kind) { fetch<decltype(kind)>(a, begin); });
  wait_ahead();
  if (__shfl_sync(~0u, threadIdx.x / 32, 0) != 0 || !elected()) return;
  r.parity = 1;
  for (int u = blockIdx.x;; u = number_behind(a, u)) {
    const Tile t = unit_or_none(a, u);
    n.tiles[n.slot] = t;
    barrier_arrive(n.bars + n.slot * 8);
    advance(n);
    if (t.there < 0) break;
    of_kind(t, [&](auto kind) { copy_unit<decltype(kind)>(a, r, t); });
  }
}

// Where a thread's codes and scales of its group's first tile lie in a step. By way of a shuffle: what the compiler
// knows it works out again for every step.
template <typename K>
DEVICE Places places_in_step(int side) {
  const int tile = side * K::kEach, codes = codes_behind(K::kTokens), scales = scales_behind(K::kTokens, K::kTiles);
  const Places p = places_of(codes + tile * kTile, scales + tile * kTileScales, threadIdx.x % 128);
  const auto hidden = [](u32 v) { return __shfl_sync(~0u, v, threadIdx.x % 32); };
  return {hidden(p.four), hidden(p.more), hidden(p.scales)};
}

// A thread's codes of a step that is there.
template <int E>
DEVICE void next_codes(Codes (&c)[E], const Ring &r, const Places &at) {
#pragma unroll
  for (int e = 0; e < E; e++) {
    const u32 tile = r.stage + e * kTile;
    c[e] = load_codes({tile + at.four, tile + at.more, r.stage + e * kTileScales + at.scales});
  }
}

template <typename K>
DEVICE const float *ratios_of(const Given &a, const Tile &t, int i) {
  const long long row = tile_there<K>(a, t, i) / 2;
  return reinterpret_cast<const float *>(a.ratios) + row * ((a.chunks + 1) / 2 + 1);
}

constexpr int kAhead = 2;             // groups of products that are decoded ahead of the one that is asked for
constexpr int kDecoded = 2 * kAhead;  // that there are registers for

// d = w @ x of all columns. Codes are loaded where nobody waits for them soon, so that with one tile a group, which has
// registers for it, all of a step is decoded while the products of the one before are under way.
template <typename K>
DEVICE void multiply(typename K::Sums &d, const Given &a, const Tile &t, int side, Ring &r) {
  constexpr int E = K::kEach, N = K::kTokens;
  constexpr int groups = 2 * E;  // of products in a step, where each is of 32 columns of a tile
  constexpr int turns = groups < kDecoded ? kDecoded / groups : 1;  // steps whose pairs have registers of their own,
  constexpr int loaded = turns;                                     // and that codes are loaded ahead of products
  const bool speaks = threadIdx.x % 32 == 0;
  const Places at = places_in_step<K>(side);
  u32 pairs[kDecoded][8], before = 0;
  Codes c[E], first[E];
#if BLOCKS || REST  // without a value they were another kind's registers, too
#pragma unroll
  for (int e = 0; e < E; e++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[e][i] = 0.0f;
#endif
  Ring codes = r;  // where the next ones are, which may be behind the last step
  barrier_wait(r.bar, r.parity);
  next_codes(first, r, at);
  advance(codes);
#pragma unroll
  for (int e = 0; e < E; e++) c[e] = first[e];
  if (loaded == 2) {
    if (a.chunks > 1) barrier_wait(codes.bar, codes.parity);
    next_codes(c, codes, at);
    advance(codes);
  }
#pragma unroll
  for (int g = 0; g < kAhead; g++) decode_half(first[g % E], g / E, pairs[g]);
#if BLOCKS
  const float *ratios[E];
  float ratio[E];
#pragma unroll
  for (int e = 0; e < E; e++) ratios[e] = ratios_of<K>(a, t, side * E + e), ratio[e] = __ldg(ratios[e]);
#endif
#pragma unroll 1
  for (int done = 0; done < a.chunks; done += turns) {
#pragma unroll
    for (int turn = 0; turn < turns; turn++) {
      const int step = done + turn;
      if (turn && step >= a.chunks) break;
      const bool more = step + loaded < a.chunks;
      const bool there = !more || barrier_passed(codes.bar, codes.parity);  // asked long before it is looked at
      const u64 x = descriptor(r.stage);
#if BLOCKS
      if (step % 2 == 0) {  // two steps are a block
        products_wait<0>();
        rescale<N, E>(d, ratio);
#pragma unroll
        for (int e = 0; e < E; e++) ratio[e] = __ldg(ratios[e] + step / 2 + 1);
      }
#endif
#pragma unroll
      for (int g = 0; g < groups; g++) {
        const int of = turn * groups + g;
        products_begin();
        Product<N>::add(d[g % E], &pairs[of % kDecoded][0], x + 4 * (g / E), BLOCKS || g >= E || step);
        Product<N>::add(d[g % E], &pairs[of % kDecoded][4], x + 4 * (g / E) + 2, true);
        products_end();
        // All but kAhead groups are done, and with the registers that are decoded into next.
        products_wait<kAhead>();
        if (g == kAhead - 1 && step && speaks) barrier_arrive(before);
        // Behind the last step what is not there is decoded, for nobody.
        const Codes now = c[(g + kAhead) % E];
        const int half = (g + kAhead) % groups / E;
        if (g == groups - 1 - kAhead % groups) {  // the last of these codes are decoded while the next come
          if (!there) barrier_wait(codes.bar, codes.parity);
          next_codes(c, codes, at);
          advance(codes);
        }
        decode_half(now, half, pairs[(of + kAhead) % kDecoded]);
      }
      before = r.bar + kEmpty;
      advance(r);
    }
  }
  products_wait<0>();
  if (speaks) barrier_arrive(before);
#if BLOCKS
  rescale<N, E>(d, ratio);
#endif
}

// The steps of a group that has no rows in a unit.
DEVICE void leave_out(const Given &a, Ring &r) {
  for (int step = 0; step < a.chunks; step++) {
    pass_step(r.bar, r.parity, threadIdx.x % 32 == 0);
    advance(r);
  }
}

template <typename K>
DEVICE void use_unit(const Given &a, const Tile &t, int side, Ring &r) {
  if (tile_of<K>(t, side, 0) * 64 >= a.rows) {
    leave_out(a, r);
    return;
  }
  typename K::Sums d;  // the first products are not added to it
  multiply<K>(d, a, t, side, r);
#pragma unroll
  for (int e = 0; e < K::kEach; e++)
#pragma unroll
    for (int i = 0; i < K::kTokens / 2; i++) not_before(d[e][i]);
  store<K>(d, a, t, side);
}

// All groups but the first.
DEVICE void use(const Given &a, Ring r, Units n) {
  const int side = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  Tile t = next_unit(n);
  // Groups begin one after the other, and so they end: of programs of several units, one stores while another
  // multiplies.
  const int later = USERS > 1 && a.units > gridDim.x ? STAGES / max(2 * USERS - 2, 1) : 0;
  if (t.there >= 0) barrier_wait(r.full + min(side * later, a.chunks - 1) * 8, 0);
  for (; t.there >= 0; t = next_unit(n)) {
#if REST  // not by `of_kind`, with which ptxas makes another loop of it
    if (t.other) {
      use_unit<Other>(a, t, side, r);
      continue;
    }
#endif
    use_unit<Usual>(a, t, side, r);
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
      barrier_init(r.full + 8 * i, 1);                   // who copies
      barrier_init(r.full + kEmpty + 8 * i, 4 * USERS);  // every other warp
    }
    for (int i = 0; i < kUnits; i++) barrier_init(n.bars + 8 * i, 1);
    barriers_are_there();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<COPY_REGISTERS>();
    copy(a, r, n);
  } else {
    more_registers<USE_REGISTERS>();
    wait_ahead();  // weights and biases may be new, too
    use(a, r, n);
  }
}
