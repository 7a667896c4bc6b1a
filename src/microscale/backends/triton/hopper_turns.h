// The loop of `hopper_wide.cu` over a unit's steps where three groups of warps or more multiply: kTurn steps in a turn,
// and products of half a step of all tiles at a time. `hopper_unit.h` and `hopper_steps.h` come before it.
//
// With so many groups what counts is how many instructions there are: a scheduler has few to spare beside products. So
// all of a turn lies a constant behind its beginning, in stages as well: of a unit's last turn some come with nothing
// in them. With two groups what counts is who waits when, and that loop is another one, `hopper_wide_loop.h`.

constexpr int kTurn = TURN;  // steps,
constexpr int kAtOnce = 2;   // of which so many are waited for and made visible at once

static_assert(kTurn % kAtOnce == 0 && STAGES % kTurn == 0 && STAGES >= 2 * kAtOnce, "whole turns");

// Of all tiles half a step, whose products are under way, and the next one, which take turns.
typedef u32 Decoded[2][8 * EACH];

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

// A thread's codes of a step; `at`: its places in a stage.
template <int E>
DEVICE void load_step(Codes (&c)[EACH], u32 stage, const Places &at) {
#pragma unroll
  for (int e = 0; e < E; e++)
    c[e] = load_codes({stage + e * kTile + at.four, stage + e * kTile + at.more, stage + e * kTileScales + at.scales});
}

template <int E>
DEVICE void decode_halves(const Codes (&c)[EACH], int half, u32 (&o)[8 * EACH]) {
#pragma unroll
  for (int e = 0; e < E; e++) decode_half(c[e], half, reinterpret_cast<u32(&)[8]>(o[8 * e]));
}

// d = w @ x of all columns, of E tiles.
//
// Codes of a step are loaded, and their first halves decoded, while the second halves of the one before are multiplied.
template <int N, int E>
DEVICE void multiply(Sums &d, Decoded &pairs, const Given &a, const Tile &t, int side, Ring &r) {
  const bool speaks = threadIdx.x % 32 == 0;
  const int chunks = operands(a, t).chunks, first_tile = side * E;
  Places at = places_from(first_tile);
  u32 before = 0, first = r.first, stage = r.stage;
  keep_apart(at, first, stage);
  steps_there(r.bar, r.parity, false);
  u64 x = descriptor(r.stage);
  Codes codes[EACH];
  load_step<E>(codes, stage, at);
  decode_halves<E>(codes, 0, pairs[0]);
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
    for (int part = 0; part < 2 * kTurn; part++) {
      const int step = part / 2, half = part % 2, next = step + 1;
      if (half == 0 && step && done + step == chunks) break;
#if BLOCKS
      if (half == 0 && (done + step) % 2 == 0) {  // two steps are a block
        products_wait<0>();
        rescale<N, E>(d, ratio);
#pragma unroll
        for (int i = 0; i < E; i++) ratio[i] = __ldg(ratios[i] + (done + step) / 2 + 1);
      }
#endif
      if (half && next == kTurn && more) {
        later = r.bar + 8 * kTurn == r.full + kEmpty ? first : stage + kTurn * kStage;
        advance_turn(r);
        then = descriptor(r.stage);
      }
      // Of this turn or of the next one, and asked before it is looked at.
      const bool here = next < kTurn, waits = half && next % kAtOnce == 0 && (here || more);
      const u32 next_bar = here ? bar + 8 * next : r.bar;
      const u32 next_parity = here ? parity : r.parity;
      const bool there = waits && steps_passed(next_bar, next_parity);
      products_begin();
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < E; e++)
          Product<N>::add(d[e], &pairs[half][8 * e + 4 * i], x + step * (kStage / 16) + 4 * half + 2 * i,
                          BLOCKS || half || i || step || done);
      products_end();
      if (waits) steps_there(next_bar, next_parity, there);
      // Behind the last step what nobody needs is loaded and decoded.
      if (half) load_step<E>(codes, here ? stage + next * kStage : later, at);
      // All products but these are done, and with the registers that are decoded into now.
      products_wait<1>();
      if (half == 0 && (step || done) && speaks) barrier_arrive(step ? bar + kEmpty + 8 * (step - 1) : before);
      decode_halves<E>(codes, 1 - half, pairs[1 - half]);
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
