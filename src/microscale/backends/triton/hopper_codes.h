// How `hopper_wide.cu` brings the codes of a unit into shared memory, a step of all its tiles at a time;
// `hopper_unit.h` and `hopper_steps.h` come before it.
//
// By the copying engine, a copy for each tile, for which one thread of each warp asks: so most of the time is left to
// those who multiply. Their scales are too small for it, and come as tokens do. Where units of few tokens have few
// steps, all threads copy 16 bytes each, which is faster there.

// Where the first step of that lies, in tiles and steps.
DEVICE u32 first_step(const Given &a, const Tile &t, int i) {
  const Operands &o = operands(a, t);
  return (static_cast<u32>(t.expert) * o.tiles + tile_there(a, t, i)) * o.chunks;
}

#if ENGINE
constexpr int kAskers = 4;  // who arrive besides all threads

// Where the next steps lie of the tiles that a warp asks for, every fourth of E of each group that multiplies.
template <int E>
struct CodesAhead {
  int warp;
  u64 from[(USERS * E + 3) / 4];
};

template <int E>
DEVICE CodesAhead<E> codes_of(const Given &a, const Tile &t) {
  CodesAhead<E> c = {__shfl_sync(~0u, threadIdx.x / 32, 0)};
#pragma unroll
  for (int j = 0; j < (USERS * E + 3) / 4; j++) {
    const u32 first = first_step(a, t, min(c.warp + 4 * j, USERS * E - 1));
    c.from[j] = operands(a, t).codes + static_cast<u64>(first) * kTile;
    unknown(c.from[j]);
  }
  return c;
}

// The step `ahead` of these.
template <int E>
DEVICE void bring(const CodesAhead<E> &c, const Ring &r, int ahead) {
  constexpr int kTiles = USERS * E;
  if (elected()) {
    barrier_expect(r.bar, (kTiles - c.warp + 3) / 4 * kTile);
#pragma unroll
    for (int j = 0; j < (kTiles + 3) / 4; j++)
      if (4 * j + 4 <= kTiles || c.warp < kTiles % 4)
        copy_bytes(r.stage + kCodes + (c.warp + 4 * j) * kTile, c.from[j] + ahead * kTile, kTile, r.bar);
  }
  __syncwarp();
}

DEVICE void bring_none(const Ring &r) {
  if (elected()) barrier_arrive(r.bar);
  __syncwarp();
}
#else
constexpr int kAskers = 0;

// Where the 16 bytes lie that a thread copies of the next steps.
template <int E>
struct CodesAhead {
  u64 from[(USERS * E * kTile + 2047) / 2048];
};

template <int E>
DEVICE CodesAhead<E> codes_of(const Given &a, const Tile &t) {
  constexpr u32 kOfTile = kTile / 16;
  CodesAhead<E> c;
#pragma unroll
  for (int j = 0; j < (USERS * E * kTile + 2047) / 2048; j++) {
    const u32 at = min(j * 128 + threadIdx.x, USERS * E * kOfTile - 1);
    const u32 first = first_step(a, t, at / kOfTile);
    c.from[j] = operands(a, t).codes + static_cast<u64>(first) * kTile + at % kOfTile * 16;
    unknown(c.from[j]);
  }
  return c;
}

template <int E>
DEVICE void bring(const CodesAhead<E> &c, const Ring &r, int ahead) {
  constexpr int kBytes = USERS * E * kTile;
  const u32 mine = threadIdx.x * 16;
#pragma unroll
  for (int j = 0; j < (kBytes + 2047) / 2048; j++)
    if (kBytes % 2048 == 0 || j * 2048 + mine < kBytes)
      copy16(r.stage + kCodes + mine + j * 2048, c.from[j] + ahead * kTile, 16);
}

DEVICE void bring_none(const Ring &) {}
#endif

template <int E>
DEVICE void go(CodesAhead<E> &c, int steps) {
#pragma unroll
  for (u64 &v : c.from) v += steps * kTile;
}
