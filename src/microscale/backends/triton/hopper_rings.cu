// Products of few tokens on Hopper, both of experts in one kernel: each group of four warps has codes brought into a
// ring of its own, decodes them into registers, 16 rows a warp, and multiplies 8 tokens at a time (`mma.sync`, which
// gives the bits of `wgmma`). Memory is what takes time here, so groups wait for little but their codes: a warp for
// each asks for them, into the next units, another one for all groups' tokens, which come in a ring, too, and a last
// one counts units of w13 that are done.
//
// A program stays on its multiprocessor and claims units, in order: a tile of up to MOST tokens times TILES of 64 rows.
// A unit of w2 waits until its tokens are done with w13, and whoever has claimed that runs and waits for nobody.
// `hopper_text.py` writes the constants in capitals, and `decode_group`; `hopper_ptx.h`, `hopper_rows.h`,
// `hopper_unit.h`, `hopper_steps.h`, `hopper_lists.h`, `hopper_ring_loop.h` and `hopper_ring_eight.h` or
// `hopper_ring_pieces.h` come before this text.

constexpr int kThreads = 128 * USERS + 32 * (USERS + 2);  // the last warp finds no tiles
constexpr bool kApart = APART && EACH == 1;               // one group has gates and the next one their ups
constexpr int kClaims = 4;

struct Shared {
  u64 bars[2 * STAGES * USERS + 2 * kTokenStages + 6 + kClaims];
  int claimed[kClaims];
  Lists lists;
  Beside beside[2];
#if APART && EACH == 1
  float4 ups[USERS][128];
#endif
};

// Barriers of a unit's tokens, of which there are two sets, and of claims. `done`: all warps are, and the last one has
// not seen it yet.
struct Bars {
  u32 full, done, empty, claims;
};

template <class What>
DEVICE void each_unit(const Given &a, const Shared &s, const Bars &b, const What &what) {
#pragma unroll 1
  for (int turn = 0;; turn++) {
    barrier_wait(b.claims + turn % kClaims * 8, turn / kClaims & 1);
    const Tile t = listed_unit(a, s.lists, s.claimed[turn % kClaims]);
    if (t.expert < 0) return;
    what(t, turn);
  }
}

DEVICE int tile_of_group(const Given &a, const Tile &t, int group, int e) {
  if (kApart && t.product == 0) return USERS / 2 * t.block + group / 2 + group % 2 * (a.of[0].width / 64);
  return row_tile(a, t, group * EACH + e);
}

DEVICE bool has_rows(const Given &a, const Tile &t, int group) {
  if (kApart && t.product == 0) return 64 * (USERS / 2 * t.block + group / 2) < a.of[0].width;
  return row_tile(a, t, group * EACH) * results_of(t) < a.of[t.product].width;
}

// A thread that has a group's codes brought.
DEVICE void bring_codes(const Given &a, const Shared &s, const Bars &b, Ring r, int group) {
  each_unit(a, s, b, [&](const Tile &t, int) {
    if (!has_rows(a, t, group)) {  // nothing, but the group goes on behind this thread
      barrier_wait(r.bar + kEmpty, r.parity);
      barrier_arrive(r.bar);
      advance_codes(r);
      return;
    }
    const Operands &o = operands(a, t);
    const int steps = t.product ? kSteps[1] : kSteps[0], stages = o.chunks / steps;
    const u32 of_codes = steps * kTile, of_scales = steps * kTileScales;
    u64 codes[EACH], scales[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int tile = min(tile_of_group(a, t, group, e), o.tiles - 1);
      const u64 step = static_cast<u64>(static_cast<u32>(t.expert) * o.tiles + tile) * o.chunks;
      codes[e] = o.codes + step * kTile;
      scales[e] = o.scales + step * kTileScales;
    }
#pragma unroll 1
    for (int i = 0; i < stages; i++) {
      barrier_wait(r.bar + kEmpty, r.parity);
      barrier_expect(r.bar, EACH * (of_codes + of_scales));
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        copy_bytes(r.stage + e * of_codes, codes[e], of_codes, r.bar);
        copy_bytes(r.stage + EACH * of_codes + e * of_scales, scales[e], of_scales, r.bar);
        codes[e] += of_codes, scales[e] += of_scales;
      }
      advance_codes(r);
    }
  });
}

#if BLOCKS
DEVICE void bring_ratios(const Given &a, const Tile &t, Beside &beside) {
  const Operands &o = operands(a, t);
  const int count = (o.chunks + 1) / 2 + 1;
  for (int i = threadIdx.x % 32; i < TILES * count; i += 32) {
    const int of = i / count, tile = min(tile_of_group(a, t, of / EACH, of % EACH), o.tiles - 1);
    const long long row = static_cast<long long>(t.expert) * ((o.tiles + 1) / 2) + tile / 2;
    beside.ratios[of][i % count] = __ldg(reinterpret_cast<const float *>(o.ratios) + row * count + i % count);
  }
}
#endif

// A warp that has tokens brought, and claims. The first claim is the last warp's, who need not find tiles.
DEVICE void bring_tokens(const Given &a, Shared &s, const Bars &b, Ring x) {
  const int lane = threadIdx.x % 32;
  int claimed = 0;
#pragma unroll 1
  for (int turn = 0;; turn++) {
    if (lane == 0 && turn) {
      s.claimed[turn % kClaims] = claimed;
      barrier_arrive(b.claims + turn % kClaims * 8);
    }
    barrier_wait(b.claims + turn % kClaims * 8, turn / kClaims & 1);
    const Tile t = listed_unit(a, s.lists, s.claimed[turn % kClaims]);
    if (t.expert < 0) return;
    if (lane == 0) claimed = claim(a.progress);  // one ahead, so that it need not wait for the number
    const Operands &o = operands(a, t);
    Beside &beside = s.beside[turn % 2];
    const int place = t.start + min(lane, t.count - 1), route = s.lists.order[place];
    const float share = t.product ? share_of(a, route) : 0.0f;
    if (t.product) {
      wait_until(tile_done(a.progress, t.tile), a.of[0].blocks);
      copies_see_stores();
    }
    const u32 full = b.full + turn % 2 * 8;
    barrier_wait(b.empty + turn % 2 * 8, (turn / 2 & 1) ^ 1);
    if (lane < kTokens) beside.routes[lane] = route, beside.shares[lane] = share;
#if BLOCKS
    bring_ratios(a, t, beside);
#endif
    __syncwarp();
    const int row = lane < TILES ? 64 * tile_of_group(a, t, lane / EACH, lane % EACH) : o.rows;
    const u32 rows = max(min(64, o.rows - row), 0);
    const u32 bias = rows * 2 * (t.product ? kBiases[1] : kBiases[0]);
    const u32 scale = (t.product ? kRowScales[1] : kRowScales[0]) ? rows * 4 : 0;
    const u32 expected = __reduce_add_sync(~0u, bias + scale);
    if (lane == 0) barrier_expect(full, expected);
    __syncwarp();
    const u64 first = static_cast<u64>(t.expert) * o.rows + row;
    if (bias) copy_bytes(shared_address(beside.bias[lane]), o.bias + first * (bias / rows), bias, full);
    if (scale) copy_bytes(shared_address(beside.scale[lane]), o.row_scale + first * 4, scale, full);
    const u64 which = t.product ? place : static_cast<u32>(route) / TOP_K;
    u64 from = o.x + which * (o.columns * 2);
    const u32 bytes = 128 * (t.product ? kSteps[1] : kSteps[0]);
    for (u32 left = o.columns * 2; left; left -= bytes, from += bytes) {
      barrier_wait(x.bar + kTokenEmpty, x.parity);
      if (lane == 0) barrier_expect(x.bar, bytes * t.count);
      __syncwarp();
      if (lane < t.count) copy_bytes(x.stage + lane * kToken, from, bytes, x.bar);
      advance_tokens(x);
    }
  }
}

// A thread of the last warp, which counts units of w13 once what has been written can be seen: whoever multiplies would
// have to wait for that.
DEVICE void count_done(const Given &a, const Shared &s, const Bars &b) {
  each_unit(a, s, b, [&](const Tile &t, int turn) {
    barrier_wait(b.done + turn % 2 * 8, turn / 2 & 1);
    barrier_arrive(b.empty + turn % 2 * 8);
    if (t.product == 0) add_one(tile_done(a.progress, t.tile));
  });
}

#if APART && EACH == 1
// Of two groups one has gates and the other their ups, which take turns in two places, `turn` being the next one's.
DEVICE void store_apart(const Sums &d, const Given &a, const Tile &t, int group, const Rows &rows, Shared &s,
                        int &turn) {
  const Operands &o = a.of[0];
  const int lane = threadIdx.x % 32;
  const int n = 64 * tile_of_group(a, t, group, 0) + 16 * (threadIdx.x % 128 / 32) + 4 * (lane % 4);
#pragma unroll
  for (int piece = 0; piece < MOST / 8; piece++) {
    if (8 * piece >= t.count) break;
    float v[4] = {d[0][4 * piece], d[0][4 * piece + 1], d[0][4 * piece + 2], d[0][4 * piece + 3]};
    finish<kFirst>(v, rows);
    float4 &ups = s.ups[group / 2 * 2 + turn][threadIdx.x % 128];
    turn ^= 1;
    if (group % 2) ups = make_float4(v[0], v[1], v[2], v[3]);
    meet_some(2 + group / 2, 256);
    if (group % 2) continue;
    v[0] = activate(a, v[0], ups.x), v[1] = activate(a, v[1], ups.y);
    v[2] = activate(a, v[2], ups.z), v[3] = activate(a, v[3], ups.w);
    const int token = 8 * piece + lane / 4;
    const u64 at = o.y + 2 * static_cast<u64>(n) + 2 * static_cast<u64>(t.start + token) * o.width;
    store8_if(token < t.count && n < o.width, at, of_one_token(v));
  }
}
#endif

// Groups that multiply.
DEVICE void use(const Given &a, Shared &s, const Bars &b, Ring r, Ring x, int group) {
  const int lane = threadIdx.x % 32;
  [[maybe_unused]] int ups = 0;
  each_unit(a, s, b, [&](const Tile &t, int turn) {
    const u32 full = b.full + turn % 2 * 8, done = b.done + turn % 2 * 8, parity = turn / 2 & 1;
    Beside &beside = s.beside[turn % 2];
    barrier_wait(full, parity);
    if (has_rows(a, t, group)) {
      Sums d;
#pragma unroll
      for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int i = 0; i < MOST / 2; i++) d[e][i] = 0.0f;
      Rows rows[EACH];
      if (t.product == 0) {
        multiply<kSteps[0]>(d, r, x, a.of[0].chunks / kSteps[0], beside, group, t.count);
#pragma unroll
        for (int e = 0; e < EACH; e++) rows[e] = rows_beside<kFirst>(beside, group * EACH + e);
#if APART && EACH == 1
        store_apart(d, a, t, group, rows[0], s, ups);
#else
        store_with<kFirst>(d, rows, a, t, group, nullptr, nullptr);
#endif
      } else {
        multiply<kSteps[1]>(d, r, x, a.of[1].chunks / kSteps[1], beside, group, t.count);
#pragma unroll
        for (int e = 0; e < EACH; e++) rows[e] = rows_beside<kSecond>(beside, group * EACH + e);
        store_with<kSecond>(d, rows, a, t, group, beside.routes, beside.shares);
      }
    } else {
      pass<kStageBytes, STAGES>(r, 1);
      pass<kTokens * kToken, kTokenStages>(x, operands(a, t).chunks / (t.product ? kSteps[1] : kSteps[0]));
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(done);
  });
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) KERNEL(const __grid_constant__ Given a) {
  DYNAMIC_SHARED(raw);
  __shared__ __align__(16) Shared s;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const u32 first = (shared_address(raw) + 127) & ~127u, bars = shared_address(s.bars);
  const u32 full = bars + 16 * STAGES * USERS;
  const Bars b = {full, full + 16, full + 32, full + 48};
  const u32 tokens = first + USERS * STAGES * kStageBytes, token_bars = full + 48 + 8 * kClaims;
  if (threadIdx.x == 0) {
    for (int i = 0; i < USERS; i++)
      for (int j = 0; j < STAGES; j++) {
        barrier_init(bars + 2 * kEmpty * i + 8 * j, 1);           // who has codes brought
        barrier_init(bars + 2 * kEmpty * i + 8 * j + kEmpty, 4);  // the group's warps
      }
    for (int i = 0; i < 2; i++)
      barrier_init(b.full + 8 * i, 1), barrier_init(b.done + 8 * i, 4 * USERS), barrier_init(b.empty + 8 * i, 1);
    for (int i = 0; i < kClaims; i++) barrier_init(b.claims + 8 * i, 1);
    for (int i = 0; i < kTokenStages; i++)
      barrier_init(token_bars + 8 * i, 1), barrier_init(token_bars + kTokenEmpty + 8 * i, 4 * USERS);
    barriers_are_there();
  }
  __syncthreads();
  wait_ahead();
  if (warp < 5 * USERS + 1) {
    find_tiles(a, s.lists);
  } else if (threadIdx.x % 32 == 0) {
    s.claimed[0] = claim(a.progress);
    barrier_arrive(b.claims);
  }
  __syncthreads();
  const int group = warp < 4 * USERS ? warp / 4 : warp - 4 * USERS;
  const u32 ring = first + group * STAGES * kStageBytes, ring_bars = bars + 2 * kEmpty * group;
  const Ring r = {ring, ring_bars, ring, ring_bars, warp >= 4 * USERS};
  const Ring x = {tokens, token_bars, tokens, token_bars, warp >= 4 * USERS};
  if (warp < 4 * USERS) {
    use(a, s, b, r, x, group);
  } else if (warp < 5 * USERS) {
    if (elected()) bring_codes(a, s, b, r, group);
  } else if (warp == 5 * USERS) {
    bring_tokens(a, s, b, x);
  } else if (elected()) {
    count_done(a, s, b);
  }
}
