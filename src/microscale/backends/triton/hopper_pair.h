// The loop of `hopper_wide.cu` over a unit's steps, two in a turn: where decoding takes as long as products. Each of
// its instructions costs then, as decoding and the matrix unit share a thread's registers. So who multiplies waits for
// copies, and makes them visible to products, once for two steps; what is loaded moves on to no other registers; and
// four products begin at once. The other one is `hopper_single.h`; `hopper_unit.h` and `hopper_steps.h` come before it.

static_assert(STAGES >= 4, "two steps that come, the one that is multiplied, and the one behind it");

// The next steps, of which so many are left, are there: two, or one.
DEVICE void steps_there(const Ring &r, int left) {
  Ring q = r;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (i < left) barrier_wait(q.bar, q.parity);
    advance(q);
  }
  products_see_copies();
}

typedef u32 Half[EACH][8];  // of a step, decoded: 32 columns of each tile

// The products of a step, a half at a time, and behind each the decoding of the half that follows, at last of the next
// step's first. `c` is free before, and takes the codes of the step after that.
template <int N, bool FIRST_OF_TWO>
DEVICE void one_step(Sums &d, Ring &r, int side, Half (&half)[2], Codes (&c)[EACH], Codes (&next)[EACH], Step &now,
                     Step &then, u32 &before, int step, int chunks, bool speaks) {
  Step last = then;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    products_begin();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      Product<N>::add(d[e], &half[h][e][0], now.x + 4 * h, h || step);
      Product<N>::add(d[e], &half[h][e][4], now.x + 4 * h + 2, true);
    }
    products_end();
    if (h == 1 && step + 2 < chunks) {
      if (FIRST_OF_TWO) steps_there(r, chunks - step - 2);
      last = take_step(c, r, side);
    }
    products_wait<1>();  // all but these are done, and with the registers that are decoded into
    if (h == 0 && step && speaks) barrier_arrive(before);
#pragma unroll
    for (int e = 0; e < EACH; e++) decode_half(h ? next[e] : c[e], 1 - h, half[1 - h][e]);
  }
  before = now.empty, now = then, then = last;
}

// d = w @ x of all columns. ptxas gives the loop of every size registers of its own for decoded weights.
template <int N>
DEVICE void multiply(Sums &d, const Given &a, const Tile &t, int side, Ring &r) {
  const bool speaks = threadIdx.x % 32 == 0;
  const int chunks = operands(a, t).chunks;
  Half half[2];
  u32 before = 0;
  Codes c[EACH], next[EACH];
  steps_there(r, chunks);
  Step now = take_step(c, r, side), then = now;
  if (chunks > 1) then = take_step(next, r, side);
#pragma unroll
  for (int e = 0; e < EACH; e++) decode_half(c[e], 0, half[0][e]);
#pragma unroll 1
  for (int step = 0;;) {
    one_step<N, true>(d, r, side, half, c, next, now, then, before, step, chunks, speaks);
    if (++step == chunks) break;
    one_step<N, false>(d, r, side, half, next, c, now, then, before, step, chunks, speaks);
    if (++step == chunks) break;
  }
  // Behind the last step its own first half, or one that was never there, has been decoded once more.
  products_wait<0>();
  if (speaks) barrier_arrive(before);
}
