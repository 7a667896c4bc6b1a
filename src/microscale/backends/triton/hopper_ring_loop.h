// A group's loop over a unit's steps in `hopper_rings.cu`, and what comes with a unit's tokens. `hopper_lists.h` comes
// before it.

constexpr int kSteps[2] = {STEPS};  // of a stage: of w13 and of w2, whose columns they divide
constexpr int kMostSteps = kSteps[0] > kSteps[1] ? kSteps[0] : kSteps[1];
constexpr int kStageBytes = EACH * kMostSteps * (kTile + kTileScales);
constexpr int kTokenStages = TOKEN_STAGES;
constexpr int kTokenEmpty = 8 * kTokenStages;  // as kEmpty
constexpr int kToken = 128 * kMostSteps + 16;  // bytes in a stage: 16 more, so that 8 lie in different banks
constexpr int kRatios = (CHUNKS + 1) / 2 + 1;  // of block FP8, see `fragments.Fragments`

// What comes with a unit's tokens.
struct __align__(16) Beside {
  u32 bias[TILES][kBiases[0] || kBiases[1] ? 64 : 4], scale[TILES][kRowScales[0] || kRowScales[1] ? 64 : 4];
  int routes[kTokens];
  __align__(8) float shares[kTokens];
#if BLOCKS
  float ratios[TILES][kRatios];
#endif
};

template <int BYTES, int COUNT>
DEVICE void advance_ring(Ring &r) {
  r.stage += BYTES, r.bar += 8;
  if (r.bar == r.full + 8 * COUNT) r.stage = r.first, r.bar = r.full, r.parity ^= 1;
}
DEVICE void advance_codes(Ring &r) { advance_ring<kStageBytes, STAGES>(r); }
DEVICE void advance_tokens(Ring &r) { advance_ring<kTokens * kToken, kTokenStages>(r); }

template <int COUNT>
DEVICE void codes_of_step(Codes (&c)[EACH], u32 stage, int step) {
#pragma unroll
  for (int e = 0; e < EACH; e++)
    c[e] = load_codes(places_of(stage + (e * COUNT + step) * kTile,
                                stage + EACH * COUNT * kTile + (e * COUNT + step) * kTileScales, threadIdx.x % 128));
}

typedef u32 Tokens[2][4];  // of a step, as products take them

DEVICE void tokens_of_step(Tokens &t, u32 x) {
  load_matrices(t[0], x);
  load_matrices(t[1], x + 64);
}

#if BLOCKS
DEVICE void rescale_few(Sums &d, const Beside &beside, int group, int block) {
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      d[e][i] *= beside.ratios[group * EACH + e][block];
      not_before(d[e][i]);  // a bias is added to what has been rounded
    }
}
#endif

// d = w @ x of all columns, COUNT steps a stage. Codes are loaded two steps ahead of their products, tokens and decoded
// weights one. `r` has codes, `x` tokens.
template <int COUNT>
DEVICE void multiply(Sums &d, Ring &r, Ring &x, int stages, const Beside &beside, int group) {
  const bool speaks = threadIdx.x % 32 == 0;
  const u32 mine = threadIdx.x % 8 * kToken + threadIdx.x % 32 / 8 * 16;
  u32 pairs[EACH][2][8];
  Tokens t;
  Codes c[EACH], next[EACH];
  barrier_wait(r.bar, r.parity);
  codes_of_step<COUNT>(c, r.stage, 0);
#pragma unroll
  for (int e = 0; e < EACH; e++) decode_half(c[e], 0, pairs[e][0]), decode_half(c[e], 1, pairs[e][1]);
  codes_of_step<COUNT>(c, r.stage, 1);
  barrier_wait(x.bar, x.parity);
  tokens_of_step(t, x.stage + mine);
#pragma unroll 1
  for (int stage = 0; stage < stages; stage++) {
    const bool more = stage + 1 < stages;
#pragma unroll
    for (int s = 0; s < COUNT; s++) {
      Tokens then;
      u32 now[EACH][2][8];
      if (s + 2 == COUNT) {  // all of the stage's codes are in registers
        __syncwarp();
        if (speaks) barrier_arrive(r.bar + kEmpty);
        advance_codes(r);
        if (more) barrier_wait(r.bar, r.parity);
      }
      if (s + 1 == COUNT) {  // and its tokens
        __syncwarp();
        if (speaks) barrier_arrive(x.bar + kTokenEmpty);
        advance_tokens(x);
        if (more) {
          barrier_wait(x.bar, x.parity);
          tokens_of_step(then, x.stage + mine);
        }
      } else {
        tokens_of_step(then, x.stage + mine + 128 * (s + 1));
      }
      if (s + 2 < COUNT)
        codes_of_step<COUNT>(next, r.stage, s + 2);
      else if (more)
        codes_of_step<COUNT>(next, r.stage, s + 2 - COUNT);
#pragma unroll
      for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int i = 0; i < 16; i++) now[e][i / 8][i % 8] = pairs[e][i / 8][i % 8];
#if BLOCKS
      const int step = stage * COUNT + s;  // two are a block
      if (step % 2 == 0) rescale_few(d, beside, group, step / 2);
#endif
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
          for (int e = 0; e < EACH; e++) multiply_16(d[e], &now[e][half][4 * k], t[half][2 * k], t[half][2 * k + 1]);
#pragma unroll
        for (int e = 0; e < EACH; e++) decode_half(c[e], half, pairs[e][half]);
      }
#pragma unroll
      for (int e = 0; e < EACH; e++) c[e] = next[e];
#pragma unroll
      for (int i = 0; i < 8; i++) t[i / 4][i % 4] = then[i / 4][i % 4];
    }
  }
#if BLOCKS
  rescale_few(d, beside, group, (stages * COUNT + 1) / 2);
#endif
}

// Stages of a ring that a group, which has no rows in a unit, does not look at.
template <int BYTES, int COUNT>
DEVICE void pass(Ring &r, int stages) {
  for (int stage = 0; stage < stages; stage++) {
    barrier_wait(r.bar, r.parity);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(r.bar + 8 * COUNT);
    advance_ring<BYTES, COUNT>(r);
  }
}

// Of a thread's two rows of a tile.
template <Kind KIND_OF>
DEVICE Rows rows_beside(const Beside &b, int tile) {
  constexpr int which = KIND_OF == kSecond;
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 * 2;
  Rows r = {0.0f, 0.0f, 1.0f, 1.0f};
  if constexpr (kBiases[which] == 1) {
    const u32 both = b.bias[tile][row / 2];
    r.bias0 = __uint_as_float(both << 16), r.bias1 = __uint_as_float(both & 0xFFFF0000);
  } else if constexpr (kBiases[which] == 2) {
    r.bias0 = __uint_as_float(b.bias[tile][row]), r.bias1 = __uint_as_float(b.bias[tile][row + 1]);
  }
  if constexpr (kRowScales[which])
    r.scale0 = __uint_as_float(b.scale[tile][row]), r.scale1 = __uint_as_float(b.scale[tile][row + 1]);
  return r;
}
