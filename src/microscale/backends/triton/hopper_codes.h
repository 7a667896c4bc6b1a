// How `hopper_wide.cu` brings the codes and scales of a unit into shared memory, a step of all its tiles at a time;
// `hopper_unit.h` and `hopper_steps.h` come before it.
//
// Codes come by the copying engine, a copy for each tile, for which one thread of each warp asks: so most of the time
// is left to those who multiply. Scales are too small for it, and come as tokens do, 16 bytes by each thread. So do
// codes where units of few tokens have few steps, which is faster there.

// Where the first step of that lies, in tiles and steps.
DEVICE u32 first_step(const Given &a, const Tile &t, int i) {
  const Operands &o = operands(a, t);
  return (static_cast<u32>(t.expert) * o.tiles + tile_there(a, t, i)) * o.chunks;
}

// Where the 16 bytes lie that a thread copies of the next steps; BYTES: of a step and tile, E tiles for each group that
// multiplies.
template <int E, int BYTES>
struct Pieces {
  u64 from[(USERS * E * BYTES + 2047) / 2048];
};

// `all`: where those of all tiles begin.
template <int E, int BYTES>
DEVICE Pieces<E, BYTES> pieces_of(const Given &a, const Tile &t, u64 all) {
  constexpr u32 kOfTile = BYTES / 16;
  Pieces<E, BYTES> p;
#pragma unroll
  for (int j = 0; j < (USERS * E * BYTES + 2047) / 2048; j++) {
    const u32 at = min(j * 128 + threadIdx.x, USERS * E * kOfTile - 1);
    p.from[j] = all + static_cast<u64>(first_step(a, t, at / kOfTile)) * BYTES + at % kOfTile * 16;
    unknown(p.from[j]);
  }
  return p;
}

// The step `ahead` of these.
template <int E, int BYTES>
DEVICE void bring(const Pieces<E, BYTES> &p, u32 to, int ahead) {
  constexpr int kBytes = USERS * E * BYTES;
  const u32 mine = threadIdx.x * 16;
#pragma unroll
  for (int j = 0; j < (kBytes + 2047) / 2048; j++)
    if (kBytes % 2048 == 0 || j * 2048 + mine < kBytes) copy16(to + mine + j * 2048, p.from[j] + ahead * BYTES, 16);
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

template <int E>
DEVICE void bring_codes(const CodesAhead<E> &c, const Ring &r, int ahead) {
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

template <int E>
using CodesAhead = Pieces<E, kTile>;

template <int E>
DEVICE CodesAhead<E> codes_of(const Given &a, const Tile &t) {
  return pieces_of<E, kTile>(a, t, operands(a, t).codes);
}

template <int E>
DEVICE void bring_codes(const CodesAhead<E> &c, const Ring &r, int ahead) {
  bring(c, r.stage + kCodes, ahead);
}

DEVICE void bring_none(const Ring &) {}
#endif

// On by so many bytes.
template <class AHEAD>
DEVICE void go(AHEAD &c, int bytes) {
#pragma unroll
  for (u64 &v : c.from) v += bytes;
}
