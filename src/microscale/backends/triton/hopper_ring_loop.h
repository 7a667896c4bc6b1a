// What the loops of `hopper_rings.cu` share, and what comes with a unit's tokens. `hopper_lists.h` comes before it.

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

#if BLOCKS
// Sums of P pieces of 8 tokens; see `rescale` of `hopper_steps.h`.
template <int P>
DEVICE void rescale_few(Sums &d, const Beside &beside, int group, int block) {
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < 4 * P; i++) {
      d[e][i] *= beside.ratios[group * EACH + e][block];
      not_before(d[e][i]);  // a bias is added to what has been rounded
    }
}
#endif

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
