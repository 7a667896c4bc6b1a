// The loop of a group of `hopper_rings.cu` over a unit's steps, where tiles have up to MOST tokens: P pieces of 8, as
// many as there are. `hopper_ring_loop.h` comes before it.

// Of half a step, as products take them, 8 tokens' each.
template <int P>
DEVICE void tokens_of_half(u32 (&t)[P][4], u32 x) {
#pragma unroll
  for (int p = 0; p < P; p++) load_matrices(t[p], x + 8 * p * kToken);
}

template <int P>
DEVICE void multiply_half(Sums &d, const u32 (&w)[EACH][8], const u32 (&t)[P][4]) {
#pragma unroll
  for (int k = 0; k < 2; k++)
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
      for (int p = 0; p < P; p++) multiply_16(&d[e][4 * p], &w[e][4 * k], t[p][2 * k], t[p][2 * k + 1]);
}

// d = w @ x of all columns, COUNT steps a stage. While half a step is multiplied, the next one is decoded. `r` has
// codes, `x` tokens.
template <int COUNT, int P>
DEVICE void multiply_pieces(Sums &d, Ring &r, Ring &x, int stages, const Beside &beside, int group) {
  const bool speaks = threadIdx.x % 32 == 0;
  const u32 mine = threadIdx.x % 8 * kToken + threadIdx.x % 32 / 8 * 16;
  Codes c[EACH];
  u32 first[EACH][8], second[EACH][8];  // of a step's halves
  u32 x_first[P][4], x_second[P][4];
  barrier_wait(r.bar, r.parity);
  codes_of_step<COUNT>(c, r.stage, 0);
#pragma unroll
  for (int e = 0; e < EACH; e++) decode_half(c[e], 0, first[e]);
  barrier_wait(x.bar, x.parity);
  tokens_of_half<P>(x_first, x.stage + mine);
#pragma unroll 1
  for (int stage = 0; stage < stages; stage++) {
    const bool more = stage + 1 < stages;
#pragma unroll
    for (int s = 0; s < COUNT; s++) {
      tokens_of_half<P>(x_second, x.stage + mine + 128 * s + 64);
#if BLOCKS
      const int step = stage * COUNT + s;  // two are a block
      if (step % 2 == 0) rescale_few<P>(d, beside, group, step / 2);
#endif
      multiply_half<P>(d, first, x_first);
#pragma unroll
      for (int e = 0; e < EACH; e++) decode_half(c[e], 1, second[e]);
      if (s + 1 < COUNT) {
        codes_of_step<COUNT>(c, r.stage, s + 1);
        tokens_of_half<P>(x_first, x.stage + mine + 128 * (s + 1));
      } else {  // all of the stage is in registers
        __syncwarp();
        if (speaks) barrier_arrive(r.bar + kEmpty), barrier_arrive(x.bar + kTokenEmpty);
        advance_codes(r), advance_tokens(x);
        if (more) {
          barrier_wait(r.bar, r.parity);
          codes_of_step<COUNT>(c, r.stage, 0);
          barrier_wait(x.bar, x.parity);
          tokens_of_half<P>(x_first, x.stage + mine);
        }
      }
      multiply_half<P>(d, second, x_second);
#pragma unroll
      for (int e = 0; e < EACH; e++) decode_half(c[e], 0, first[e]);
    }
  }
#if BLOCKS
  rescale_few<P>(d, beside, group, (stages * COUNT + 1) / 2);
#endif
}

template <int COUNT>
DEVICE void multiply(Sums &d, Ring &r, Ring &x, int stages, const Beside &beside, int group, int tokens) {
  switch (rounded(tokens)) {
#define PIECES(n) \
  case n: multiply_pieces<COUNT, n / 8>(d, r, x, stages, beside, group); break;
    EACH_SIZE(PIECES)
  }
}
