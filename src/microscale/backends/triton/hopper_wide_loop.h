// The loop of `hopper_wide.cu` over a unit's steps where two groups of warps multiply; `hopper_turns.h` is the one for
// more. `hopper_unit.h` and `hopper_steps.h` come before it.

constexpr int kTurn = 1;  // steps that are counted and waited for at a time
typedef u32 Decoded[kGroups][8];

static_assert(STAGES >= 3, "the step that is multiplied, the one behind it, and the next, whose codes are loaded");

// A step: its tokens, for products, and the barrier of those who are done with it.
struct Step {
  u64 x;
  u32 empty;
};

// The next step, once it is there; `there`: it is known to be. Products of its tokens may be asked for behind this.
DEVICE Step next_step(Ring &r, bool there) {
  if (!there) barrier_wait(r.bar, r.parity);
  products_see_copies();
  const Step s = {descriptor(r.stage), r.bar + kEmpty};
  advance(r);
  return s;
}

// A thread's codes; `at`: its places in a stage.
DEVICE Half load_half(u32 stage, const Places &at, int e, int p) {
  const u32 tile = stage + e * kTile;
  Half h;
#if BITS == 8
  h.w = shared16(tile + (p ? at.more : at.four));
#else
  h.w = shared8(tile + at.four + 8 * p);
#endif
#if BITS == 6
  h.more = shared4(tile + at.more + 4 * p);
#endif
  h.scale = shared4(stage + at.scales + e * kTileScales + (E4M3_SCALES ? 4 * p : 0));
  return h;
}

constexpr int kAhead = EACH;  // groups that are decoded ahead of the one that is asked for

// d = w @ x of all columns.
//
// Codes are loaded a group before they are decoded, while products are under way: of 8 bits and 144 tokens there are no
// registers for more.
template <int N, int E>
DEVICE void multiply(Sums &d, Decoded &pairs, const Given &a, const Tile &t, int side, Ring &r) {
  static_assert(E == EACH, "pairs are of so many tiles");
  const bool speaks = threadIdx.x % 32 == 0;
  const int chunks = operands(a, t).chunks, tile = side * EACH;
  Places at = places_from(tile);
  u32 before = 0, first = r.first, stage = r.stage;
  keep_apart(at, first, stage);
#if BLOCKS
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[e][i] = 0.0f;
#endif
  Step now = next_step(r, false), then = now;
#pragma unroll
  for (int e = 0; e < EACH; e++) decode_half(load_half(stage, at, e, 0), 0, pairs[e]);
  Half next = load_half(stage, at, 0, 1);
#if BLOCKS
  const float *ratios[EACH];
  float ratio[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) ratios[e] = ratios_of(a, t, tile + e), ratio[e] = __ldg(ratios[e]);
#endif
#pragma unroll 1
  for (int step = 0; step < chunks; step++) {
    const bool more = step + 1 < chunks;
    const bool there = more && barrier_passed(r.bar, r.parity);  // asked long before it is looked at
    u32 later = stage;
#if BLOCKS
    if (step % 2 == 0) {  // two steps are a block
      products_wait<0>();
      rescale<N>(d, ratio);
#pragma unroll
      for (int e = 0; e < EACH; e++) ratio[e] = __ldg(ratios[e] + step / 2 + 1);
    }
#endif
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      products_begin();
      Product<N>::add(d[g % EACH], &pairs[g][0], now.x + 4 * (g / EACH), BLOCKS || g >= EACH || step);
      Product<N>::add(d[g % EACH], &pairs[g][4], now.x + 4 * (g / EACH) + 2, true);
      products_end();
      const int ahead = (g + kAhead) % kGroups, loaded = (ahead + 1) % kGroups;
      if (loaded == 0 && more) {
        later = r.bar == r.full ? first : stage + kStage;
        then = next_step(r, there);
      }
      // Behind the last step its own first halves are loaded and decoded once more.
      const Half half = next;
      next = load_half(later, at, loaded % EACH, loaded / EACH);
      // All but kAhead groups are done, and with the registers that are decoded into next.
      products_wait<kAhead>();
      if (g == kAhead - 1 && step && speaks) barrier_arrive(before);
      decode_half(half, ahead / EACH, pairs[ahead]);
    }
    before = now.empty, now = then, stage = later;
  }
  products_wait<0>();
  if (speaks) barrier_arrive(before);
#if BLOCKS
  rescale<N>(d, ratio);
#endif
}
