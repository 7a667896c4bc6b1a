// The loop of `hopper_wide.cu` over a unit's steps, one after the other: where products are what takes time. The other
// one is `hopper_pair.h`; `hopper_unit.h` and `hopper_steps.h` come before it.

// A thread's codes of the next step, once it is there; products of its tokens may be asked for behind this.
DEVICE Step next_step(Codes (&c)[EACH], Ring &r, int side, bool there) {
  if (!there) barrier_wait(r.bar, r.parity);
  products_see_copies();
  return take_step(c, r, side);
}

DEVICE const float *ratios_of(const Given &a, const Tile &t, int i) {
  const Operands &o = operands(a, t);
  const long long row = static_cast<long long>(t.expert) * ((o.tiles + 1) / 2) + tile_there(a, t, i) / 2;
  return reinterpret_cast<const float *>(o.ratios) + row * ((o.chunks + 1) / 2 + 1);
}

constexpr int kAhead = EACH;          // groups that are decoded ahead of the one that is asked for
constexpr int kDecoded = 2 * kAhead;  // that there are registers for

// d = w @ x of all columns. ptxas gives the loop of every size registers of its own for decoded weights.
//
// Whoever begins products waits for all that is loaded. So a step's codes are loaded a step before they are decoded,
// and behind products that others are decoded after.
template <int N>
DEVICE void multiply(Sums &d, const Given &a, const Tile &t, int side, Ring &r) {
  const bool speaks = threadIdx.x % 32 == 0;
  const int chunks = operands(a, t).chunks;
  u32 pairs[kDecoded][8], before = 0;
  Codes c[EACH], next[EACH], after[EACH];  // of this step, the next one, and that after it
#if BLOCKS
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[e][i] = 0.0f;
#endif
  Step now = next_step(next, r, side, false), then = now;
#pragma unroll
  for (int e = 0; e < EACH; e++) after[e] = next[e];
  if (chunks > 1) then = next_step(after, r, side, false);
#pragma unroll
  for (int g = 0; g < kAhead; g++) decode_half(next[g], 0, pairs[g]);
#if BLOCKS
  const float *ratios[EACH];
  float ratio[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) ratios[e] = ratios_of(a, t, side * EACH + e), ratio[e] = __ldg(ratios[e]);
#endif
#pragma unroll 1
  for (int step = 0; step < chunks; step++) {
    const bool more = step + 2 < chunks;
    const bool there = more && barrier_passed(r.bar, r.parity);  // asked long before it is looked at
    Step last = then;
#pragma unroll
    for (int e = 0; e < EACH; e++) c[e] = next[e], next[e] = after[e];
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
      Product<N>::add(d[g % EACH], &pairs[g % kDecoded][0], now.x + 4 * (g / EACH), BLOCKS || g >= EACH || step);
      Product<N>::add(d[g % EACH], &pairs[g % kDecoded][4], now.x + 4 * (g / EACH) + 2, true);
      products_end();
      if (g == kGroups - 1 && more) last = next_step(after, r, side, there);
      // All but kAhead groups are done, and with the registers that are decoded into next.
      products_wait<kAhead>();
      if (g == kAhead - 1 && step && speaks) barrier_arrive(before);
      // Behind the last step its own first ones, or such as were never there, are decoded once more.
      const int ahead = g + kAhead;
      decode_half(ahead < kGroups ? c[ahead % EACH] : next[ahead % EACH], ahead % kGroups / EACH,
                  pairs[ahead % kDecoded]);
    }
    before = now.empty, now = then, then = last;
  }
  products_wait<0>();
  if (speaks) barrier_arrive(before);
#if BLOCKS
  rescale<N>(d, ratio);
#endif
}
