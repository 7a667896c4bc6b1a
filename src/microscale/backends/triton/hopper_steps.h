// Steps of 64 columns in shared memory, and decoding them: what `hopper_wide.cu` and `hopper_linear.cu` share. `Tile`,
// a unit of work, and `Sums`, a thread's of a unit, come before it.

constexpr int kTile = 512 * BITS;                     // bytes of 64 rows by 64 columns,
constexpr int kTileScales = E4M3_SCALES ? 256 : 128;  // and of their scales
constexpr int kCodes = (MOST + 15) / 16 * 2048;       // behind 64 columns of all tokens, which come 16 at a time,
constexpr int kScales = kCodes + TILES * kTile;       // as many columns of the weights, and behind these their scales:
constexpr int kStage = (kScales + TILES * kTileScales + 1023) / 1024 * 1024;  // bytes of a step in shared memory

// Steps in shared memory: the barriers of all that are full, those of all that are empty, and where one is in the
// round.
struct Ring {
  u32 first, full;
  u32 stage, bar, parity;
};
constexpr int kEmpty = 8 * STAGES;  // behind the barrier of the same step

DEVICE void advance(Ring &r) {
  r.stage += kStage, r.bar += 8;
  if (r.bar == r.full + kEmpty) r.stage = r.first, r.bar = r.full, r.parity ^= 1;
}

// A step that a group does not multiply, once it is there; `speaks`: of each warp one thread.
DEVICE void pass_step(u32 bar, u32 parity, bool speaks) {
  barrier_wait(bar, parity);
  __syncwarp();  // all have seen it before it can be another step's
  if (speaks) barrier_arrive(bar + kEmpty);
}

// The units of a program, which the group that copies finds out and the others read. All have read one when all steps
// of it have been multiplied, so that there are never more than the stages can be of, and one at each end.
constexpr int kUnits = STAGES + 2;
struct Units {
  Tile *tiles;
  u32 bars, parity;
  int slot;
};

DEVICE void advance(Units &n) {
  if (++n.slot == kUnits) n.slot = 0, n.parity ^= 1;
}

DEVICE Tile next_unit(Units &n) {
  barrier_wait(n.bars + n.slot * 8, n.parity);
  const Tile t = n.tiles[n.slot];
  advance(n);
  return t;
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

// Where a thread's codes and scales of a tile lie.
struct Places {
  u32 four, more, scales;
};

DEVICE Places places_of(u32 codes, u32 scales, int thread) {
  return {codes + thread * 16, codes + 2048 + thread * (BITS == 6 ? 8 : 16),
          scales + thread / 4 * (E4M3_SCALES ? 8 : 4)};
}

// Where a thread's codes lie in a stage, from a tile on of those of all groups.
DEVICE Places places_from(int tile) {
  return places_of(kCodes + tile * kTile, kScales + tile * kTileScales, threadIdx.x % 128);
}

// Keeps a thread's addresses of codes apart from the ring's, of which ptxas knows that they are a warp's as long as
// nothing else is made of them, as products need them, and from the thread's number, or it works them out again for
// every step.
DEVICE void keep_apart(Places &at, u32 &first, u32 &stage) {
  for (u32 *v : {&at.four, &at.more, &at.scales, &first, &stage}) unknown(*v);
}

DEVICE Codes load_codes(const Places &p) {
  Codes c;
  c.four = shared16(p.four);
#if BITS == 6
  const uint2 v = shared8(p.more);
  c.more = make_uint4(v.x, v.y, 0, 0);
#elif BITS == 8
  c.more = shared16(p.more);
#endif
#if E4M3_SCALES
  const uint2 s = shared8(p.scales);
  c.scale = s.x;
  c.scale1 = s.y;
#else
  c.scale = shared4(p.scales);
#endif
  return c;
}

// Half a step of a tile: 32 columns of a thread's.
struct Half {
#if BITS == 8
  uint4 w;
#else
  uint2 w;
#endif
#if BITS == 6
  u32 more;
#endif
  u32 scale;
};

// As eight pairs of bfloat16; `p`: whether it is the second one.
DEVICE void decode_half(const Half &h, int p, u32 (&o)[8]) {
#if E4M3_SCALES
  const u32 s = h.scale;
#else
  const u32 s = (p ? __funnelshift_l(h.scale, h.scale, 8) : h.scale) & 0x7F807F80;
#endif
#if BITS == 8
  decode_group(o, h.w.x, h.w.y, h.w.z, h.w.w, s);
#elif BITS == 6
  decode_group(o, h.w.x, h.w.y, h.more, s);
#else
  decode_group(o, h.w.x, h.w.y, s);
#endif
}

DEVICE void decode_half(const Codes &c, int p, u32 (&o)[8]) {
  Half h;
#if BITS == 8
  h.w = p ? c.more : c.four;
#else
  h.w = p ? make_uint2(c.four.z, c.four.w) : make_uint2(c.four.x, c.four.y);
#endif
#if BITS == 6
  h.more = p ? c.more.y : c.more.x;
#endif
#if E4M3_SCALES
  h.scale = p ? c.scale1 : c.scale;
#else
  h.scale = c.scale;
#endif
  decode_half(h, p, o);
}

// 128-byte rows, eight of them swizzled together.
DEVICE u64 descriptor(u32 address) {
  return (static_cast<u64>((address & 0x3FFFF) >> 4)) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

constexpr int kGroups = 2 * EACH;  // of products in a step, where each is of 32 columns of a tile

// Sums that nothing is added to at the moment, times what block FP8 has between two blocks, see `fragments.Fragments`.
template <int N, int E = EACH>
DEVICE void rescale(Sums &d, const float (&ratio)[EACH]) {
#pragma unroll
  for (int e = 0; e < E; e++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      not_before(d[e][i]);
      d[e][i] *= ratio[e];
    }
}
