// The loop of `hopper_wide.cu` over a unit's steps where three groups of warps or more multiply: kTurn steps in a turn,
// and products of a whole step of a tile at a time. `hopper_unit.h` and `hopper_steps.h` come before it.
//
// With so many groups what counts is how many instructions there are: a scheduler has few to spare beside products. So
// all of a turn lies a constant behind its beginning, in stages as well: of a unit's last turn some come with nothing
// in them. With two groups what counts is who waits when, and that loop is another one, `hopper_wide_loop.h`.

constexpr int kTurn = TURN;  // steps,
constexpr int kAtOnce = 2;   // of which so many are waited for and made visible at once

static_assert(kTurn % kAtOnce == 0 && STAGES % kTurn == 0 && STAGES >= 2 * kAtOnce, "whole turns");

// Of the tile whose products are under way and of the next one, which take turns.
typedef u32 Decoded[2][16];

// Whether steps from one on are there; `bar`: its barrier.
DEVICE bool steps_passed(u32 bar, u32 parity) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) all &= barrier_passed(bar + 8 * i, parity);
  return all;
}

// The same steps, once they are there; `there`: they are known to be. Products of them may be asked for behind this.
DEVICE void steps_there(u32 bar, u32 parity, bool there) {
  if (!there)
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) barrier_wait(bar + 8 * i, parity);
  products_see_copies();
}

DEVICE void advance_turn(Ring &r) {
  r.stage += kTurn * kStage, r.bar += 8 * kTurn;
  if (r.bar == r.full + kEmpty) r.stage = r.first, r.bar = r.full, r.parity ^= 1;
}

// A thread's codes of a turn's tile, of E a step; `at`: its places in a stage.
template <int E>
DEVICE Codes load_tile(u32 turn, const Places &at, int tile) {
  const u32 stage = turn + tile / E * kStage, codes = stage + tile % E * kTile;
  return load_codes({codes + at.four, codes + at.more, stage + tile % E * kTileScales + at.scales});
}

DEVICE void decode_tile(const Codes &c, u32 (&o)[16]) {
  decode_half(c, 0, reinterpret_cast<u32(&)[8]>(o[0]));
  decode_half(c, 1, reinterpret_cast<u32(&)[8]>(o[8]));
}

// d = w @ x of all columns, of E tiles.
//
// Codes are loaded a tile before they are decoded, while products are under way.
template <int N, int E>
DEVICE void multiply(Sums &d, Decoded &pairs, const Given &a, const Tile &t, int side, Ring &r) {
  constexpr int kTilesOfTurn = kTurn * E;  // that a group multiplies
  const bool speaks = threadIdx.x % 32 == 0;
  const int chunks = operands(a, t).chunks, first_tile = side * E;
  Places at = places_from(first_tile);
  u32 before = 0, first = r.first, stage = r.stage;
  keep_apart(at, first, stage);
  steps_there(r.bar, r.parity, false);
  u64 x = descriptor(r.stage);
  decode_tile(load_tile<E>(stage, at, 0), pairs[0]);
  Codes next = load_tile<E>(stage, at, 1);
#if BLOCKS
  const float *ratios[EACH];
  float ratio[EACH];
#pragma unroll
  for (int e = 0; e < E; e++) {
    ratios[e] = ratios_of(a, t, first_tile + e), ratio[e] = __ldg(ratios[e]);
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[e][i] = 0.0f;
  }
#endif
#pragma unroll 1
  for (int done = 0; done < chunks; done += kTurn) {
    const bool more = done + kTurn < chunks;
    const u32 bar = r.bar, parity = r.parity;
    u64 then = x;
    u32 later = stage;
#pragma unroll
    for (int tile = 0; tile < kTilesOfTurn; tile++) {
      const int step = tile / E, e = tile % E, loaded = tile + 2;
      if (e == 0 && step && done + step == chunks) break;
#if BLOCKS
      if (e == 0 && (done + step) % 2 == 0) {  // two steps are a block
        products_wait<0>();
        rescale<N, E>(d, ratio);
#pragma unroll
        for (int i = 0; i < E; i++) ratio[i] = __ldg(ratios[i] + (done + step) / 2 + 1);
      }
#endif
      if (loaded == kTilesOfTurn && more) {
        later = r.bar + 8 * kTurn == r.full + kEmpty ? first : stage + kTurn * kStage;
        advance_turn(r);
        then = descriptor(r.stage);
      }
      // Of this turn or of the next one, and asked before it is looked at.
      const bool here = loaded < kTilesOfTurn, waits = loaded % (kAtOnce * E) == 0 && (here || more);
      const u32 next_bar = here ? bar + 8 * (loaded / E) : r.bar + 8 * (loaded / E - kTurn);
      const u32 next_parity = here ? parity : r.parity;
      const bool there = waits && steps_passed(next_bar, next_parity);
      const u32(&w)[16] = pairs[tile % 2];
      products_begin();
#pragma unroll
      for (int i = 0; i < 4; i++)
        Product<N>::add(d[e], &w[4 * i], x + step * (kStage / 16) + 2 * i, BLOCKS || i || step || done);
      products_end();
      if (waits) steps_there(next_bar, next_parity, there);
      // Behind the last step what nobody needs is loaded and decoded.
      const Codes codes = next;
      next = load_tile<E>(here ? stage : later, at, loaded % kTilesOfTurn);
      // All products but these are done, and with the registers that are decoded into now.
      products_wait<1>();
      if (e == 0 && (step || done) && speaks) barrier_arrive(step ? bar + kEmpty + 8 * (step - 1) : before);
      decode_tile(codes, pairs[(tile + 1) % 2]);
    }
    before = bar + kEmpty + 8 * (kTurn - 1), x = then, stage = later;
  }
  products_wait<0>();
  const int last = (chunks - 1) % kTurn;
  if (speaks) barrier_arrive(r.bar + kEmpty + 8 * last);
  for (int step = last + 1; step < kTurn; step++) pass_step(r.bar + 8 * step, r.parity, speaks);
  advance_turn(r);
#if BLOCKS
  rescale<N, E>(d, ratio);
#endif
}
