// The loop of a group of `hopper_rings.cu` over a unit's steps, where no tile has more than 8 tokens.
// `hopper_ring_loop.h` comes before it. With one tile of weights a group it is 7 to 17 % faster than the loop of
// `hopper_ring_pieces.h` with one piece.

typedef u32 Tokens[2][4];  // of a step, as products take them

DEVICE void tokens_of_step(Tokens &t, u32 x) {
  load_matrices(t[0], x);
  load_matrices(t[1], x + 64);
}

// d = w @ x of all columns, COUNT steps a stage. Codes are loaded two steps ahead of their products, tokens and decoded
// weights one. `r` has codes, `x` tokens.
template <int COUNT>
DEVICE void multiply(Sums &d, Ring &r, Ring &x, int stages, const Beside &beside, int group, int) {
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
      if (step % 2 == 0) rescale_few<1>(d, beside, group, step / 2);
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
  rescale_few<1>(d, beside, group, (stages * COUNT + 1) / 2);
#endif
}
