// Which tiles of tokens there are, found by every program for itself while its first codes are still far away: a kernel
// ahead that sorts routes costs more, and what is in shared memory is at once there. `hopper_unit.h` comes before it.

constexpr int kTokens = MOST;                              // of a tile
constexpr int kRouteWarps = (ROUTES + 31) / 32;            // that routes are enough for, one of each lane
constexpr int kPasses = (ROUTES + FINDERS - 1) / FINDERS;  // routes of a lane at most

// In shared memory.
struct Lists {
  u8 counts[kRouteWarps][(EXPERTS + 15) / 16 * 16];  // routes that a warp has for an expert
  int used, tiles[kRouteWarps];                      // tiles, and those that a warp's routes begin, of two kinds
  unsigned short firsts[EXPERTS];                    // an expert's first tile
  unsigned short order[kTokens * MOST_TILES];        // of each expert its routes, from its first tile's place on
  unsigned short expert[MOST_TILES];                 // of each tile
  u8 count[MOST_TILES];                              // of its tokens
#if MOST > 8
  unsigned short start[MOST_TILES];  // and the first one's place
#endif
};

// Integers of 4 or 8 bytes, of which those are meant that 4 hold.
DEVICE int id_at(u64 ids, int kind, int i) {
  return load(reinterpret_cast<const int *>(ids) + (kind == 8 ? 2 * i : i));
}

// The expert here of a route, or -1.
DEVICE int expert_of(const Given &a, int route) {
  if (route >= a.routes) return -1;
  int e = id_at(a.ids, ID_BYTES, route);
  if (MAP_BYTES) e = e >= 0 && e < a.known ? id_at(a.expert_map, MAP_BYTES, e) : -1;
  return e >= 0 && e < EXPERTS ? e : -1;
}

// Whether a tile has many tokens.
DEVICE bool is_long(int tokens) { return 3 * tokens > 2 * kTokens; }

// Two numbers of tiles, of those that have many tokens and of the others.
DEVICE int of_many(int both) { return both >> 16; }
DEVICE int of_few(int both) { return both & 0xFFFF; }

// Up to so many rounds of units programs should end with short ones. With more it is better if some wait for memory
// while others multiply, all the time.
constexpr int kFewRounds = 10;

// Tiles come in the order of their first routes, in few rounds those of many tokens before the others; those of an
// expert one after the other, with equal parts of its tokens, see `tokens_of_each`. For FINDERS threads, the first
// ones, who then meet the others.
DEVICE void find_tiles(const Given &a, Lists &l) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 *counts = reinterpret_cast<u32 *>(l.counts);
  int e[kPasses], rank[kPasses], tiles[kPasses], all[kPasses];  // of a route's expert; its rank among the expert's
  int each[kPasses], place[kPasses];  // tokens of a tile; the warp's tiles of both kinds up to here
#pragma unroll
  for (int p = 0; p < kPasses; p++) e[p] = expert_of(a, p * FINDERS + threadIdx.x);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(l.counts) / 4); i += FINDERS) counts[i] = 0;
  u32 same[kPasses];
#pragma unroll
  for (int p = 0; p < kPasses; p++) same[p] = __match_any_sync(~0u, e[p]);
  meet_some(1, FINDERS);
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    rank[p] = __popc(same[p] & ((1u << lane) - 1));
    if (e[p] >= 0 && rank[p] == 0) l.counts[p * (FINDERS / 32) + warp][e[p]] = __popc(same[p]);
  }
  meet_some(1, FINDERS);
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    const int mine = p * (FINDERS / 32) + warp;
    all[p] = 0;
    if (e[p] >= 0)
#pragma unroll
      for (int w = 0; w < kRouteWarps; w++) {
        const int n = l.counts[w][e[p]];
        all[p] += n;
        if (w < mine) rank[p] += n;
      }
    tiles[p] = e[p] >= 0 && rank[p] == 0 ? (all[p] + kTokens - 1) / kTokens : 0;
    each[p] = kTokens == 8 || tiles[p] == 0 ? kTokens : tokens_of_each(all[p], tiles[p]);
    place[p] = is_long(each[p]) ? tiles[p] << 16 : tiles[p];
#pragma unroll
    for (int off = 1; off < 32; off *= 2) {
      const int v = __shfl_up_sync(~0u, place[p], off);
      if (lane >= off) place[p] += v;
    }
    if (lane == 31 && mine < kRouteWarps) l.tiles[mine] = place[p];
  }
  meet_some(1, FINDERS);
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    int used = 0, before = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; w++) {
      if (w == p * (FINDERS / 32) + warp) before = used;
      used += l.tiles[w];
    }
    const int in_all = of_many(used) + of_few(used);
    if (p == 0 && threadIdx.x == 0) l.used = in_all;
    if (tiles[p] == 0) continue;
    const bool many = is_long(each[p]);
    const bool rounds = in_all * (a.of[0].blocks + a.of[1].blocks) > kFewRounds * static_cast<int>(gridDim.x);
    before += place[p];
    const int end = rounds ? of_many(before) + of_few(before) : many ? of_many(before) : of_many(used) + of_few(before);
    const int first = end - tiles[p];
    l.firsts[e[p]] = first;
    for (int k = 0; k < tiles[p]; k++) {
      l.expert[first + k] = e[p], l.count[first + k] = min(each[p], all[p] - each[p] * k);
#if MOST > 8
      l.start[first + k] = kTokens * first + each[p] * k;
#endif
    }
  }
  meet_some(1, FINDERS);
#pragma unroll
  for (int p = 0; p < kPasses; p++)
    if (e[p] >= 0) l.order[kTokens * l.firsts[e[p]] + rank[p]] = p * FINDERS + threadIdx.x;
}

DEVICE Tile listed_unit(const Given &a, const Lists &l, int u) {
  Tile t = unit_of(a, l.used, u);
  if (t.tile >= l.used) return t;
  t.expert = l.expert[t.tile];
#if MOST > 8
  t.start = l.start[t.tile];
#else
  t.start = kTokens * t.tile;
#endif
  t.count = l.count[t.tile];
  return t;
}
