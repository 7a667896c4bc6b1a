// What `hopper_linear.cu` works on: the kernel's argument, units of work, and what becomes of sums.

struct __align__(64) Given {
  u8 boxes[3][128];  // of tokens, as the driver describes them: of usual units, others, and those that are not full
  u64 y, codes, scales, ratios, row_scale, bias;
  int units, blocks, group;  // usual units in all; those of one tile of tokens; tiles of tokens that take turns
  int rests, rest_blocks;    // other units, as the first two
  int tokens, usual, each;   // M; those of usual units; of a tile
  int rows, tiles, chunks;   // N, and how many times 64 of N and of K
};

struct Tile {
  int there;  // -1: none, nor of the units that follow
  int start;  // of its tokens: the first
  int count;  // how many
  int block;  // of weight rows
  int other;  // not a usual unit
};

// A kind of units: of so many tiles of 64 rows for each group of warps, and so many tokens.
template <int E, int N, bool OTHER>
struct Kind {
  static constexpr int kEach = E, kTiles = E * USERS, kTokens = N, kOther = OTHER;
  typedef float Sums[E][N / 2];  // a thread's
};
typedef Kind<EACH, MOST, false> Usual;
#if REST
typedef Kind<REST_TILES / USERS, REST, true> Other;
#endif

// `work` with the kind of a unit.
template <typename Work>
DEVICE void of_kind(const Tile &t, Work work) {
#if REST
  if (t.other) {
    work(Other{});
    return;
  }
#endif
  work(Usual{});
}

// Usual units come first, and behind them the others.
DEVICE Tile unit(const Given &a, int u) {
  Tile t;
  t.there = t.other = 0;
#if REST
  if (u >= a.units) {
    u -= a.units;
    t.other = 1;
    t.block = u % a.rest_blocks;
    t.start = a.usual + u / a.rest_blocks * REST;
    t.count = min(REST, a.tokens - t.start);
    return t;
  }
#endif
  const int whole = a.blocks * a.group, of = u / whole, in = u - of * whole;
  const int height = min((a.usual + a.each - 1) / a.each - of * a.group, a.group);
  t.block = in / height;
  t.start = (of * a.group + in - t.block * height) * a.each;
  t.count = min(a.each, a.usual - t.start);
  return t;
}

DEVICE Tile unit_or_none(const Given &a, int u) {
  Tile none;
  none.there = -1;
  return u < a.units + a.rests ? unit(a, u) : none;
}

// The number of the unit that a program takes behind one. Others are for programs that have a usual one less.
DEVICE int number_behind(const Given &a, int u) {
#if REST
  const int over = a.units % gridDim.x;
  if (u >= a.units) return u + gridDim.x - over;
  if (u + gridDim.x >= a.units && blockIdx.x < over) return a.units + a.rests;
#endif
  return u + gridDim.x;
}

// Which tile of the matrix a group's `e`th is.
template <typename K>
DEVICE int tile_of(const Tile &t, int side, int e) {
  return K::kTiles * t.block + side * K::kEach + e;
}

// Whoever brings boxes takes long for rows past the last token, which are not there: so a unit that is not full has a
// box of its own.
template <typename K>
DEVICE const void *box_of(const Given &a, const Tile &t) {
  return a.boxes[t.count < K::kTokens ? 2 : K::kOther];
}

DEVICE Rows rows_of(const Given &a, int tile) {
  const int row = first_row(tile);
  return rows_at<BIAS, ROW_SCALE>(a.bias, a.row_scale, min(row, a.rows - 1), min(row + 1, a.rows - 1));
}

constexpr int kTogether = 4;  // pieces of 8 tokens whose results are worked out side by side: one alone mostly waits

// Four results of a token that a thread stores, of its `e`th tile and 8 tokens.
template <typename K>
DEVICE uint2 results(const typename K::Sums &d, const Rows (&rows)[K::kEach], int e, int j) {
  const float *v = &d[e][4 * j];
  float c[4] = {v[0], v[1], v[2], v[3]};
  finish<BIAS, ROW_SCALE>(c, rows[e]);
  return of_one_token(c);
}

// Sums of a unit to y.
template <typename K>
DEVICE void store(const typename K::Sums &d, const Given &a, const Tile &t, int side) {
  const int warp = threadIdx.x % 128 / 32, g = threadIdx.x % 32 / 4, t4 = threadIdx.x % 4;
  Rows rows[K::kEach];
#pragma unroll
  for (int e = 0; e < K::kEach; e++) rows[e] = rows_of(a, tile_of<K>(t, side, e));
#pragma unroll
  for (int e = 0; e < K::kEach; e++) {
    const int n = tile_of<K>(t, side, e) * 64 + 16 * warp + 4 * t4;
    const bool there = n < a.rows;
    const u64 y = a.y + 2 * static_cast<u64>(n);
#pragma unroll
    for (int first = 0; first < K::kTokens / 8; first += kTogether) {
      if (8 * first >= t.count) break;
      uint2 c[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++)
        if (first + i < K::kTokens / 8) c[i] = results<K>(d, rows, e, first + i);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int token = 8 * (first + i) + g;
        if (first + i < K::kTokens / 8)
          store8_if(there && token < t.count, y + 2 * static_cast<u64>(t.start + token) * a.rows, c[i]);
      }
    }
  }
}
