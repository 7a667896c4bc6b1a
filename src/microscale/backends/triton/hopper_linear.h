// What `hopper_linear.cu` works on: the kernel's argument, units of work, and what becomes of sums.

struct __align__(64) Given {
  u8 boxes[128];  // of tokens, as the driver describes them
  u64 y, codes, scales, ratios, row_scale, bias;
  int units, blocks, group;  // units in all; those of one tile of tokens; tiles of tokens that take turns
  int tokens, each;          // M, and of a tile
  int rows, tiles, chunks;   // N, and how many times 64 of N and of K
};

struct Tile {
  int there;  // -1: none, nor of the units that follow
  int start;  // of its tokens: the first
  int count;  // how many
  int block;  // of weight rows
};

// A thread's sums of EACH tiles.
typedef float Sums[EACH][MOST / 2];

DEVICE Tile unit(const Given &a, int u) {
  Tile t;
  const int whole = a.blocks * a.group, of = u / whole, in = u - of * whole;
  const int height = min((a.tokens + a.each - 1) / a.each - of * a.group, a.group);
  t.block = in / height;
  t.start = (of * a.group + in - t.block * height) * a.each;
  t.count = min(a.each, a.tokens - t.start);
  t.there = 0;
  return t;
}

DEVICE Tile unit_or_none(const Given &a, int u) {
  Tile none;
  none.there = -1;
  return u < a.units ? unit(a, u) : none;
}

DEVICE Rows rows_of(const Given &a, int tile) {
  const int row = first_row(tile);
  return rows_at<BIAS, ROW_SCALE>(a.bias, a.row_scale, min(row, a.rows - 1), min(row + 1, a.rows - 1));
}

constexpr int kTogether = 4;  // pieces of 8 tokens whose results are worked out side by side: one alone mostly waits

// Four results of a token that a thread stores, of its `e`th tile and 8 tokens.
DEVICE uint2 results(const Sums &d, const Rows (&rows)[EACH], int e, int j) {
  const float *v = &d[e][4 * j];
  float c[4] = {v[0], v[1], v[2], v[3]};
  finish<BIAS, ROW_SCALE>(c, rows[e]);
  return of_one_token(c);
}

// Sums of a unit to y.
DEVICE void store(const Sums &d, const Given &a, const Tile &t, int side) {
  const int warp = threadIdx.x % 128 / 32, g = threadIdx.x % 32 / 4, t4 = threadIdx.x % 4;
  Rows rows[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) rows[e] = rows_of(a, TILES * t.block + side * EACH + e);
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int n = (TILES * t.block + side * EACH + e) * 64 + 16 * warp + 4 * t4;
    const bool there = n < a.rows;
    const u64 y = a.y + 2 * static_cast<u64>(n);
#pragma unroll
    for (int first = 0; first < MOST / 8; first += kTogether) {
      if (8 * first >= t.count) break;
      uint2 c[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++)
        if (first + i < MOST / 8) c[i] = results(d, rows, e, first + i);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int token = 8 * (first + i) + g;
        if (first + i < MOST / 8)
          store8_if(there && token < t.count, y + 2 * static_cast<u64>(t.start + token) * a.rows, c[i]);
      }
    }
  }
}
