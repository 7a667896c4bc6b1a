// What `hopper_wide.cu` works on: the kernel's argument, units of work, codes on their way, and what becomes of sums.

constexpr int kTile = 128 * BITS;                   // words of 64 rows by 64 columns,
constexpr int kTileScales = E4M3_SCALES ? 64 : 32;  // and of their scales
constexpr bool kGated = GATED;

enum Mode { kLinear, kFirst, kSecond };

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

// The tile of 64 rows that a group takes: gates and ups that lie apart are the two groups'.
DEVICE int row_tile(const Given &a, int block, int side) {
  return APART ? block + side * (a.width / 64) : USERS * block + side;
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

// A thread's codes and scales of a tile; where its first 16 bytes, and its scales are.
DEVICE Codes load_codes(const u32 *codes, const u32 *scales, int thread) {
  Codes c;
  c.four = load16(codes);
#if BITS == 6
  const uint2 v = __ldg(reinterpret_cast<const uint2 *>(codes + 512 - thread * 2));
  c.more = make_uint4(v.x, v.y, 0, 0);
#elif BITS == 8
  c.more = load16(codes + 512);
#endif
#if E4M3_SCALES
  const uint2 s = __ldg(reinterpret_cast<const uint2 *>(scales));
  c.scale = s.x;
  c.scale1 = s.y;
#else
  c.scale = __ldg(scales);
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
