// What `hopper_wide.cu` works on: the kernel's argument, units of work, codes on their way, and what becomes of sums.

constexpr int kTile = 512 * BITS;                     // bytes of 64 rows by 64 columns,
constexpr int kTileScales = E4M3_SCALES ? 256 : 128;  // and of their scales
constexpr bool kGated = GATED;

enum Mode { kLinear, kFirst, kSecond };
constexpr bool kInTurn = MODE == kFirst && kGated && !APART;  // a tile's rows are gates and ups in turn,
constexpr int kResults = kInTurn ? 32 : 64;                   // and so many columns of y come of it

struct Given {
  u64 y, x, codes, scales, ratios, row_scale, bias, tile_experts, tile_starts, ends, order, weights;
  int units, blocks, group;  // units in all; those of one tile of tokens; tiles of tokens that take turns
  int tokens, tokens_each;   // of a linear: all, and of a tile
  int rows, width, columns, tiles, chunks;  // N, of y, K, and how many times 64 of N and of K
  int top_k;
  float alpha, beta, limit;
};

struct Tile {
  int expert;  // -1: none, nor of the units that follow
  int start;   // of its tokens: the first place
  int count;   // how many
  int block;   // of weight rows
};

// The least of SIZES that so many tokens fit in.
DEVICE int rounded(int n) {
  constexpr int sizes[] = {SIZES};  // descending
  int found = sizes[0];
#pragma unroll
  for (int size : sizes)
    if (n <= size) found = size;
  return found;
}

DEVICE Tile unit(const Given &a, int u) {
  Tile t;
  if (MODE == kLinear) {
    const int whole = a.blocks * a.group, of = u / whole, in = u - of * whole;
    const int height = min((a.tokens + a.tokens_each - 1) / a.tokens_each - of * a.group, a.group);
    t.block = in / height;
    t.start = (of * a.group + in - t.block * height) * a.tokens_each;
    t.count = min(a.tokens_each, a.tokens - t.start);
    t.expert = 0;
    return t;
  }
  const int tile = u / a.blocks;
  t.block = u - tile * a.blocks;
  t.expert = load(reinterpret_cast<const int *>(a.tile_experts) + tile);
  if (t.expert < 0) return t;
  // The expert's tokens in equal parts, instead of full tiles and what is left.
  const int *ends = reinterpret_cast<const int *>(a.ends);
  const int first = t.expert ? load(ends + t.expert - 1) : 0, all = load(ends + t.expert) - first;
  const int parts = (all + MOST - 1) / MOST, each = (all + parts - 1) / parts + 7 & ~7;
  const int part = (load(reinterpret_cast<const int *>(a.tile_starts) + tile) - first) / MOST;
  t.start = first + part * each;
  t.count = min(each, all - part * each);
  return t;
}

DEVICE Tile unit_or_none(const Given &a, int u) {
  Tile none;
  none.expert = -1;
  return u < a.units ? unit(a, u) : none;
}

// The tiles of 64 rows that a group takes: EACH that follow one another, or a tile of gates and one of ups that lie
// apart.
DEVICE int row_tile(const Given &a, int block, int i) {
  return APART ? USERS * block + i / 2 + i % 2 * (a.width / 64) : TILES * block + i;
}

struct Codes {
  uint4 four;
#if BITS > 4
  uint4 more;
#endif
  u32 scale;
#if E4M3_SCALES
  u32 scale1;
#endif
};

// A thread's codes and scales of a tile that lies in shared memory.
DEVICE Codes load_codes(u32 codes, u32 scales, int thread) {
  Codes c;
  c.four = shared16(codes + thread * 16);
#if BITS == 6
  const uint2 v = shared8(codes + 2048 + thread * 8);
  c.more = make_uint4(v.x, v.y, 0, 0);
#elif BITS == 8
  c.more = shared16(codes + 2048 + thread * 16);
#endif
#if E4M3_SCALES
  const uint2 s = shared8(scales + thread / 4 * 8);
  c.scale = s.x;
  c.scale1 = s.y;
#else
  c.scale = shared4(scales + thread / 4 * 4);
#endif
  return c;
}

// Half a step: 32 columns, as eight pairs of bfloat16.
DEVICE void decode_half(const Codes &c, int p, u32 (&o)[8]) {
#if E4M3_SCALES
  const u32 s = p ? c.scale1 : c.scale;
#else
  const u32 s = (p ? __funnelshift_l(c.scale, c.scale, 8) : c.scale) & 0x7F807F80;
#endif
#if BITS == 4
  decode_group(o, p ? c.four.z : c.four.x, p ? c.four.w : c.four.y, s);
#elif BITS == 6
  decode_group(o, p ? c.four.z : c.four.x, p ? c.four.w : c.four.y, p ? c.more.y : c.more.x, s);
#else
  const uint4 w = p ? c.more : c.four;
  decode_group(o, w.x, w.y, w.z, w.w, s);
#endif
}

DEVICE float activate(const Given &a, float gate, float up) {
#if HAS_LIMIT
  if (kGated) up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
  if (KIND != SWIGLU_STEP) gate = gate > a.limit ? a.limit : gate;
#endif
  float h;
  if (KIND == SILU || KIND == SWIGLU_STEP) {
    h = quotient(gate, 1.0f + exponential(-gate));
    if (HAS_LIMIT && KIND == SWIGLU_STEP) h = h > a.limit ? a.limit : h;
  } else {
    h = gate * quotient(1.0f, 1.0f + exponential(-(a.alpha * gate)));
    up = up + a.beta;
  }
  return kGated ? h * up : h;
}

#if BIAS
DEVICE float bias_at(const Given &a, long long i) {
#if BIAS == 1
  return __uint_as_float(static_cast<u32>(__ldg(reinterpret_cast<const unsigned short *>(a.bias) + i)) << 16);
#elif BIAS == 2
  return __ldg(reinterpret_cast<const float *>(a.bias) + i);
#endif
}
#endif

// A thread's sums of EACH tiles.
typedef float Sums[EACH][MOST / 2];

// What a thread needs of the rows of one of its tiles, which are neighbours, behind their sums.
struct Rows {
  float bias0, bias1, scale0, scale1;
};

DEVICE Rows rows_of(const Given &a, const Tile &t, int tile) {
  Rows r = {0.0f, 0.0f, 1.0f, 1.0f};
#if BIAS || ROW_SCALE
  const int row = 64 * tile + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 * 2;
  const long long row0 = static_cast<long long>(t.expert) * a.rows + min(row, a.rows - 1);
  const long long row1 = static_cast<long long>(t.expert) * a.rows + min(row + 1, a.rows - 1);
#endif
#if BIAS
  r.bias0 = bias_at(a, row0), r.bias1 = bias_at(a, row1);
#endif
#if ROW_SCALE
  r.scale0 = __ldg(reinterpret_cast<const float *>(a.row_scale) + row0);
  r.scale1 = __ldg(reinterpret_cast<const float *>(a.row_scale) + row1);
#endif
  return r;
}

DEVICE void scaled(float (&c)[4], const Rows &r) {
#if ROW_SCALE
  c[0] *= r.scale0, c[1] *= r.scale0, c[2] *= r.scale1, c[3] *= r.scale1;
#endif
#if BIAS
  c[0] += r.bias0, c[1] += r.bias0, c[2] += r.bias1, c[3] += r.bias1;
#endif
}

constexpr int kTogether = 3;  // pieces of 8 tokens whose results are worked out side by side: one alone mostly waits

// The results of 8 tokens that a thread stores: two of one token and two of the next, or, of gates and ups in turn,
// two of one. `tile` is the first or only one of the thread's `e`th pair.
DEVICE uint2 results(const Sums &d, const Given &a, const Rows (&rows)[EACH], int e, int j, const float *shares) {
  const float *v = &d[e][4 * j];
  float c[4] = {v[0], v[1], v[2], v[3]};
  scaled(c, rows[e]);
  if (kInTurn) return make_uint2(transposed(packed(activate(a, c[0], c[2]), activate(a, c[1], c[3]))), 0);
  if (MODE == kFirst) {
    const float *other = &d[EACH - 1][4 * j];
    float u[4] = {other[0], other[1], other[2], other[3]};
    scaled(u, rows[EACH - 1]);
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = activate(a, c[i], APART ? u[i] : c[i]);
  }
  if (MODE == kSecond) {
    const float2 s = *reinterpret_cast<const float2 *>(&shares[8 * j + threadIdx.x % 4 * 2]);
    c[0] *= s.x, c[1] *= s.y, c[2] *= s.x, c[3] *= s.y;
  }
  const u32 even = transposed(packed(c[0], c[1])), odd = transposed(packed(c[2], c[3]));
  return make_uint2(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
}

// Sums of a unit to y: `routes` and `shares` are those of its tokens, in the second product of experts.
DEVICE void store(const Sums &d, const Given &a, const Tile &t, int side, const int *routes, const float *shares) {
  const int warp = threadIdx.x % 128 / 32, g = threadIdx.x % 32 / 4, t4 = threadIdx.x % 4;
  Rows rows[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) rows[e] = rows_of(a, t, row_tile(a, t.block, side * EACH + e));
#pragma unroll
  for (int e = 0; e < (APART ? 1 : EACH); e++) {
    const int tile = row_tile(a, t.block, side * EACH + e);
    const int n = tile * kResults + (kInTurn ? 8 * warp + 2 * t4 : 16 * warp + 4 * t4);
    const bool there = n < a.width;
    const u64 y = a.y + 2 * static_cast<u64>(n);
#pragma unroll
    for (int first = 0; first < MOST / 8; first += kTogether) {
      if (8 * first >= t.count) break;
      constexpr int kLast = MOST / 8;
      uint2 c[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++)
        if (first + i < kLast) c[i] = results(d, a, rows, e, first + i, shares);
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int token = 8 * (first + i) + g;
        if (first + i >= kLast || token >= t.count || !there) continue;
        const u64 at = y + 2 * static_cast<u64>(MODE == kSecond ? routes[token] : t.start + token) * a.width;
        if (kInTurn)
          store4(at, c[i].x);
        else
          store8(at, c[i]);
      }
    }
  }
}

// A token's place in the result of the second product, and its share there.
struct Route {
  int to;
  float share;
};

DEVICE Route route_of(const Given &a, const Tile &t, int token) {
  Route r = {0, 0.0f};
  if (MODE != kSecond) return r;
  r.to = load(reinterpret_cast<const int *>(a.order) + t.start + min(token, t.count - 1));
#if WEIGHTS == 1
  const unsigned short bits = __ldg(reinterpret_cast<const unsigned short *>(a.weights) + r.to);
  r.share = __uint_as_float(static_cast<u32>(bits) << 16);
#else
  r.share = __ldg(reinterpret_cast<const float *>(a.weights) + r.to);
#endif
  return r;
}
