// What `hopper_wide.cu` works on: the kernel's argument, units of work, codes on their way, and what becomes of sums.

constexpr bool kGated = GATED;

enum Kind { kFirst, kSecond };              // of the products
constexpr bool kInTurn = kGated && !APART;  // of the first, a tile's rows are gates and ups in turn
constexpr int kBiases[2] = {BIAS};          // of w13 and w2: 0 none, 1 bfloat16, 2 float32
constexpr bool kRowScales[2] = {ROW_SCALE};

struct Operands {
  u64 y, x, codes, scales, ratios, row_scale, bias;
  int rows, width, columns, tiles, chunks;  // N, of y, K, and how many times 64 of N and of K
  int blocks;                               // units of one tile of tokens
#if FP8
  int scale_rows;  // of the weights' scales,
  u64 x_scales, y_scales;
#endif
};

#if FP8
struct __align__(64) Given {
  u8 boxes[2][128];  // of weights, as the driver describes them
#else
struct Given {
#endif
  Operands of[2];
  u64 tile_experts, tile_starts, ends, order, progress, weights;
  float alpha, beta, limit;
  u64 ids, expert_map;  // where programs find tiles themselves,
  int routes, known;    // and how many there are
};

struct Tile {
  int expert;   // -1: none, nor of the units that follow
  int start;    // of its tokens: the first place
  int count;    // how many
  int block;    // of weight rows,
  int first;    // of its tiles of 64 rows,
  int each;     // and how many of these a group has
  int product;  // 0 or 1
  int tile;     // of tokens
};

DEVICE const Operands &operands(const Given &a, const Tile &t) { return a.of[t.product]; }

// The least of SIZES that so many tokens fit in.
DEVICE int rounded(int n) {
  constexpr int sizes[] = {SIZES};  // descending
  int found = sizes[0];
#pragma unroll
  for (int size : sizes)
    if (n <= size) found = size;
  return found;
}

// Tokens of a tile, where an expert has so many and so many tiles: equal parts, instead of full tiles and what is left,
// of as many tokens as products take.
DEVICE int tokens_of_each(int all, int tiles) {
  constexpr int kLeast = FP8 ? 64 : 8;
  return (all + tiles - 1) / tiles + kLeast - 1 & -kLeast;
}

// The last round of units may be far from full. Then tiles of tokens, from the last one back, have smaller units of w2
// instead, kFewer tiles a group, so many that they are a full round, and these come last. Three of them are two usual
// ones: of an odd number one is kept, but by tiles which w13 is not done with when the round before is claimed.
constexpr int kFewer = FEWER, kFewerTiles = kFewer ? USERS * kFewer : 1;
struct Parts {
  int whole;           // tiles of tokens that have usual units alone,
  int some, kept;      // those behind them that keep so many each,
  int smaller, alone;  // and have so many smaller ones; and how many the last have, which keep none
};

DEVICE Parts parts_of(const Given &a, int used) {
  const int ahead = a.of[0].blocks, blocks = a.of[1].blocks, tiles = a.of[1].tiles, programs = gridDim.x;
  const int units = used * (ahead + blocks), over = units % programs, kept = blocks % 2, lost = max(blocks - kept, 1);
  const int smaller = (tiles - kept * TILES + kFewerTiles - 1) / kFewerTiles;
  const int alone = (tiles + kFewerTiles - 1) / kFewerTiles;
  const int late = max(used - (units / programs - 1) * programs / ahead, 0);
  const int last = min(late, (over + blocks - 1) / blocks), some = (max(over - last * blocks, 0) + lost - 1) / lost;
  const bool fits = some * smaller + last * alone <= programs;
  if (units < programs || blocks == 1 || some + last > used || !fits) return {used, 0, kept, smaller, alone};
  return {used - some - last, some, kept, smaller, alone};
}

// Of `used` tiles of tokens all of w13, then all of w2, whose tokens are done long before by then. Without an expert
// yet.
DEVICE Tile unit_of(const Given &a, int used, int u) {
  const int ahead = used * a.of[0].blocks;
  Tile t = {-1};
  t.each = EACH;
  t.product = u >= ahead;
  if (t.product) u -= ahead;
  int tile = 0, blocks = a.of[t.product].blocks, first = 0;  // from this tile of tokens on, and tile of 64 rows
  if (kFewer && t.product) {
    const Parts p = parts_of(a, used);
    const int others = u - p.whole * blocks, smaller = others - p.some * p.kept, last = smaller - p.some * p.smaller;
    if (others >= 0) u = others, tile = p.whole, blocks = p.kept;
    if (smaller >= 0) u = smaller, blocks = p.smaller, first = TILES * p.kept, t.each = kFewer;
    if (last >= 0) u = last, tile = p.whole + p.some, blocks = p.alone, first = 0;
  }
  t.tile = u / blocks;
  t.block = u - t.tile * blocks;
  t.tile += tile;
  t.first = first + USERS * t.each * t.block;
  return t;
}

// The tiles of 64 rows that a group takes: EACH that follow one another, or a tile of gates and one of ups that lie
// apart.
DEVICE int row_tile(const Given &a, const Tile &t, int i) {
  if (APART && t.product == 0) return USERS * t.block + i / 2 + i % 2 * (a.of[0].width / 64);
  return t.first + i;
}

// A tile of a unit's weights, or the last one.
DEVICE int tile_there(const Given &a, const Tile &t, int i) { return min(row_tile(a, t, i), operands(a, t).tiles - 1); }

// Of block FP8, between its blocks; see `fragments.Fragments`.
DEVICE const float *ratios_of(const Given &a, const Tile &t, int i) {
  const Operands &o = operands(a, t);
  const long long row = static_cast<long long>(t.expert) * ((o.tiles + 1) / 2) + tile_there(a, t, i) / 2;
  return reinterpret_cast<const float *>(o.ratios) + row * ((o.chunks + 1) / 2 + 1);
}

// Columns of y that come of a tile.
DEVICE int results_of(const Tile &t) { return kInTurn && t.product == 0 ? 32 : 64; }

DEVICE float activate(const Given &a, float gate, float up) {
#if HAS_LIMIT
  if (kGated) up = -at_most(-at_most(up, a.limit), a.limit);
  if (KIND != SWIGLU_STEP) gate = at_most(gate, a.limit);
#endif
  float h;
  if (KIND == SILU || KIND == SWIGLU_STEP) {
    h = gate * sigmoid(gate);
    if (HAS_LIMIT && KIND == SWIGLU_STEP) h = at_most(h, a.limit);
  } else {
    h = gate * sigmoid(a.alpha * gate);
    up = up + a.beta;
  }
  return kGated ? h * up : h;
}

// A thread's sums of EACH tiles.
typedef float Sums[EACH][MOST / 2];

template <Kind KIND_OF>
DEVICE Rows rows_of(const Given &a, const Tile &t, int tile) {
  constexpr int which = KIND_OF == kSecond;
  const Operands &o = a.of[which];
  const int row = first_row(tile);
  const long long row0 = static_cast<long long>(t.expert) * o.rows + min(row, o.rows - 1);
  const long long row1 = static_cast<long long>(t.expert) * o.rows + min(row + 1, o.rows - 1);
  return rows_at<kBiases[which], kRowScales[which]>(o.bias, o.row_scale, row0, row1);
}

template <Kind KIND_OF>
DEVICE void finish(float (&c)[4], const Rows &r) {
  constexpr int which = KIND_OF == kSecond;
  finish<kBiases[which], kRowScales[which]>(c, r);
}

// What a thread stores of 8 tokens and its `e`th tile: four results of one of them, or, of gates and ups in turn, two.
template <Kind KIND_OF>
DEVICE uint2 results(const Sums &d, const Given &a, const Rows (&rows)[EACH], int e, int j, const float *shares) {
  const float *v = &d[e][4 * j];
  float c[4] = {v[0], v[1], v[2], v[3]};
  finish<KIND_OF>(c, rows[e]);
  if (KIND_OF == kFirst && kInTurn)
    return make_uint2(transposed(packed(activate(a, c[0], c[2]), activate(a, c[1], c[3]))), 0);
  if (KIND_OF == kFirst) {
    const float *other = &d[EACH - 1][4 * j];
    float u[4] = {other[0], other[1], other[2], other[3]};
    finish<KIND_OF>(u, rows[EACH - 1]);
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = activate(a, c[i], APART ? u[i] : c[i]);
  }
  if (KIND_OF == kSecond) {
    const float2 s = *reinterpret_cast<const float2 *>(&shares[8 * j + threadIdx.x % 4 * 2]);
    c[0] *= s.x, c[1] *= s.y, c[2] *= s.x, c[3] *= s.y;
  }
  return of_one_token(c);
}

// Sums of a unit to y: `routes` and `shares` are those of its tokens, in the second product of experts.
template <Kind KIND_OF>
DEVICE void store_with(const Sums &d, const Rows (&rows)[EACH], const Given &a, const Tile &t, int side,
                       const int *routes, const float *shares) {
  constexpr bool in_turn = KIND_OF == kFirst && kInTurn;
  constexpr int kStored = KIND_OF == kFirst && APART ? 1 : EACH;  // tiles,
  // and pieces of 8 tokens whose results are worked out side by side: one alone mostly waits.
  constexpr int kTogether = kStored == 1 ? 5 : kStored == 2 ? 2 : 1;
  const Operands &o = a.of[KIND_OF == kSecond];
  const int warp = threadIdx.x % 128 / 32, g = threadIdx.x % 32 / 4, t4 = threadIdx.x % 4;
  u64 y[kStored];
  bool there[kStored];
#pragma unroll
  for (int e = 0; e < kStored; e++) {
    const int tile = row_tile(a, t, side * t.each + e);
    const int n = in_turn ? 32 * tile + 8 * warp + 2 * t4 : 64 * tile + 16 * warp + 4 * t4;
    there[e] = e < t.each && n < o.width;
    y[e] = o.y + 2 * static_cast<u64>(n);
  }
#pragma unroll
  for (int first = 0; first < MOST / 8; first += kTogether) {
    if (8 * first >= t.count) break;
    uint2 c[kTogether][kStored];
#pragma unroll
    for (int i = 0; i < kTogether; i++)
#pragma unroll
      for (int e = 0; e < kStored; e++)
        if (first + i < MOST / 8) c[i][e] = results<KIND_OF>(d, a, rows, e, first + i, shares);
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (first + i >= MOST / 8) continue;
      const int token = 8 * (first + i) + g;
      const u64 at = 2 * static_cast<u64>(KIND_OF == kSecond ? routes[token] : t.start + token) * o.width;
#pragma unroll
      for (int e = 0; e < kStored; e++) {
        const bool stored = token < t.count && there[e];
        if (in_turn)
          store4_if(stored, y[e] + at, c[i][e].x);
        else
          store8_if(stored, y[e] + at, c[i][e]);
      }
    }
  }
}

template <Kind KIND_OF>
DEVICE void store(const Sums &d, const Given &a, const Tile &t, int side, const int *routes, const float *shares) {
  Rows rows[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) rows[e] = rows_of<KIND_OF>(a, t, row_tile(a, t, side * t.each + min(e, t.each - 1)));
  store_with<KIND_OF>(d, rows, a, t, side, routes, shares);
}

DEVICE float share_of(const Given &a, int route) {
#if WEIGHTS == 1
  return __uint_as_float(static_cast<u32>(__ldg(reinterpret_cast<const unsigned short *>(a.weights) + route)) << 16);
#else
  return __ldg(reinterpret_cast<const float *>(a.weights) + route);
#endif
}
