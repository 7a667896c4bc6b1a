// Decoding steps of 64 columns: what `hopper_wide.cu` and `hopper_linear.cu` share. `hopper_sizes.h`, `hopper_stages.h`
// and `Sums`, a thread's of a unit, come before it.

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

constexpr int kGroups = 2 * EACH;  // of products in a step, where each is of 32 columns of a tile

// Sums that nothing is added to at the moment, times what block FP8 has between two blocks, see `fragments.Fragments`.
template <int N, int E = EACH, int TILES_OF, int ROOM>
DEVICE void rescale(float (&d)[TILES_OF][ROOM], const float (&ratio)[TILES_OF]) {
#pragma unroll
  for (int e = 0; e < E; e++)
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      not_before(d[e][i]);
      d[e][i] *= ratio[e];
    }
}
