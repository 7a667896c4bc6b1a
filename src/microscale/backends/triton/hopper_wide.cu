// Products of many tokens on Hopper: one group of four warps copies tokens and codes into shared memory, two to four
// others decode 64 to 192 rows of weights each into registers and multiply. `hopper_text.py` writes the constants in
// capitals, `decode_group` and `Product` above this text; `hopper_ptx.h`, `hopper_rows.h`, `hopper_unit.h`,
// `hopper_steps.h`, `hopper_codes.h`, `hopper_wide_loop.h` or `hopper_turns.h`, and `hopper_tiles.h` come before it.
//
// A program stays on its multiprocessor and takes units: TILES of 64 rows times one tile of at most MOST tokens, whose
// number is fitted to what is there: one of SIZES. No barrier holds the groups together: the one that copies runs
// ahead, also into the next unit, and while one group decodes, activates or stores, another multiplies.
//
// Both products of experts are one list, from which programs claim: a unit of w2 waits until its tokens are done with
// w13, and whoever has claimed that runs and waits for nobody. A linear is `hopper_linear.cu`'s.

constexpr int kUnrolled =
    4;  // steps whose addresses are constants apart: a new one waits until the last copy has read it

// N tokens, 16 at a time, and the weights of all groups, E tiles each, all columns.
template <int N, int E>
DEVICE void copy_tokens(const Given &a, Ring &r, const Tile &t) {
  const Operands &o = operands(a, t);
  const int piece = threadIdx.x % 8, token = threadIdx.x / 8;
  const u32 copy_at = token * 128 + ((piece ^ (token % 8)) << 4);
  // Where each token's 16 bytes of the first step lie. Those past the end repeat the last.
  constexpr int kCopies = (N + 15) / 16;
  u32 which[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; j++) which[j] = t.start + min(token + 16 * j, t.count - 1);
  if (t.product == 0)
#pragma unroll
    for (int j = 0; j < kCopies; j++) which[j] = static_cast<u32>(route_at(a, which[j])) / TOP_K;
  u64 x[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; j++) {
    x[j] = o.x + static_cast<u64>(which[j]) * static_cast<u32>(o.columns * 2) + 16 * piece;
    unknown(x[j]);
  }
  CodesAhead<E> codes = codes_of<E>(a, t);
  Pieces<E, kTileScales> scales = pieces_of<E, kTileScales>(a, t, o.scales);
  const int chunks = o.chunks;
#pragma unroll 1
  for (int done = 0; done < chunks; done += kUnrolled) {
#pragma unroll
    for (int s = 0; s < kUnrolled; s++) {
      if (done + s >= chunks) break;
      barrier_wait(r.bar + kEmpty, r.parity);
      bring_codes(codes, r, s);
      bring(scales, r.stage + kScales, s);
      const int bytes = EVEN || (done + s) * 64 + piece * 8 < o.columns ? 16 : 0;
#pragma unroll
      for (int j = 0; j < kCopies; j++) copy16(r.stage + copy_at + j * 2048, x[j] + s * 128, bytes);
      barrier_arrive_copied(r.bar);
      advance(r);
    }
#pragma unroll
    for (int j = 0; j < kCopies; j++) x[j] += kUnrolled * 128;
    go(codes, kUnrolled * kTile);
    go(scales, kUnrolled * kTileScales);
  }
  for (int done = chunks; done % kTurn; done++) {  // the rest of a turn, in which nothing comes
    barrier_wait(r.bar + kEmpty, r.parity);
    bring_none(r);
    barrier_arrive(r.bar);
    advance(r);
  }
}

template <int E>
DEVICE void copy_tiles(const Given &a, Ring &r, const Tile &t) {
  switch (rounded(t.count)) {
#define COPY(n) \
  case n: copy_tokens<n, E>(a, r, t); break;
    EACH_SIZE(COPY)
  }
}

DEVICE void copy_unit(const Given &a, Ring &r, const Tile &t) {
  if (kFewer && t.each == kFewer)
    copy_tiles<kFewer ? kFewer : EACH>(a, r, t);
  else
    copy_tiles<EACH>(a, r, t);
}

// A use that never comes, behind all loops: without it ptxas gives the loop of every size registers of its own for
// decoded weights, and if these are too few, lets products wait for one another.
DEVICE void never_reached(const Decoded &pairs, const Tile &t) {
  if (t.count >= 0) return;
#pragma unroll
  for (const auto &some : pairs)
#pragma unroll
    for (u32 v : some) needs(v);
}

template <int E>
DEVICE void multiply_tiles(Sums &d, Decoded &pairs, const Given &a, const Tile &t, int side, Ring &r) {
  switch (rounded(t.count)) {
#define MULTIPLY(n) \
  case n: multiply<n, E>(d, pairs, a, t, side, r); break;
    EACH_SIZE(MULTIPLY)
  }
}

// Whether a group has rows in a unit.
DEVICE bool takes_part(const Given &a, const Tile &t, int side) {
  return row_tile(a, t, side * t.each) * results_of(t) < operands(a, t).width;
}

// In two places which take turns, the routes of a unit's tokens, and their shares.
__shared__ int routes_[2][USERS][MOST];
__shared__ __align__(8) float shares_[2][USERS][MOST];

DEVICE void use_unit(const Given &a, const Tile &t, int side, int turn, Ring &r) {
  int *routes = routes_[turn][side];
  float *shares = shares_[turn][side];
  constexpr int kRounds = (MOST + 127) / 128;
  const int thread = threadIdx.x % 128;
  Sums d;  // the first products are not added to it
  Route route[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; i++) route[i] = route_of(a, t, thread + 128 * i);
  Decoded pairs;
  if (kFewer && t.each == kFewer)
    multiply_tiles<kFewer ? kFewer : EACH>(d, pairs, a, t, side, r);
  else
    multiply_tiles<EACH>(d, pairs, a, t, side, r);
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int i = 0; i < MOST / 2; i++) not_before(d[e][i]);
  never_reached(pairs, t);
  if (t.product == 0) {
    store<kFirst>(d, a, t, side, routes, shares);
    tell(a, t, side);
  } else {
#pragma unroll
    for (int i = 0; i < kRounds; i++)
      if (thread + 128 * i < MOST) routes[thread + 128 * i] = route[i].to, shares[thread + 128 * i] = route[i].share;
    meet(side);
    store<kSecond>(d, a, t, side, routes, shares);
  }
}
