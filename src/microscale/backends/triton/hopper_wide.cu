// Products of many tokens on Hopper: one group of four warps copies tokens into shared memory, two or three others
// decode 64 rows of weights each into registers and multiply. `hopper_text.py` writes the constants in capitals,
// `decode_group` and `Product` above this text, and `hopper_ptx.h` and `hopper_unit.h` come before it.
//
// A program stays on its multiprocessor and takes every gridDim-th unit: USERS tiles of 64 rows times one tile of at
// most MOST tokens, whose number is fitted to what is there: one of SIZES. No barrier holds the groups together: the
// one that copies runs ahead, also into the next unit, and while one group decodes, another multiplies.

constexpr int kStage = MOST * 128;   // bytes of 64 columns of all tokens
constexpr int kAhead = 2;            // steps whose codes are on their way to registers,
constexpr int kAsked = 8;            // and to the cache
constexpr int kUsers = 128 * USERS;  // threads that multiply

struct Ring {
  u32 stages, full, empty;
  int slot;
  u32 parity;
};

DEVICE void advance(Ring &r) {
  if (++r.slot == STAGES) r.slot = 0, r.parity ^= 1;
}

// Of the weights, which the other groups read, 128 bytes of every step that a thread asks for; null: none.
DEVICE const u32 *asked(const Given &a, const Tile &t) {
  constexpr int kLines = kTile / 32;
  if (t.expert < 0 || threadIdx.x >= kLines * USERS) return nullptr;
  const long long tile =
      static_cast<long long>(t.expert) * a.tiles + min(row_tile(a, t.block, threadIdx.x / kLines), a.tiles - 1);
  return reinterpret_cast<const u32 *>(a.codes) + tile * a.chunks * kTile + (threadIdx.x % kLines) * 32;
}

DEVICE void ask_first(const Given &a, const u32 *ask) {
  for (int step = 0; step < min(kAsked, a.chunks); step++)
    if (ask) ask_for(ask + step * kTile);
}

// COPIES times 16 tokens, all columns.
template <int COPIES>
DEVICE void copy_unit(const Given &a, Ring &r, const Tile &t) {
  const int piece = threadIdx.x % 8, token = threadIdx.x / 8;
  const u32 copy_at = r.stages + token * 128 + ((piece ^ (token % 8)) << 4);
  // Where each token's 16 bytes of the first step lie, in units of them. Those past the end repeat the last.
  u32 from[COPIES];
#pragma unroll
  for (int j = 0; j < COPIES; j++) {
    const int place = t.start + min(token + 16 * j, t.count - 1);
    u32 which = place;
    if (MODE == kFirst) which = static_cast<u32>(load(reinterpret_cast<const int *>(a.order) + place)) / a.top_k;
    from[j] = which * static_cast<u32>(a.columns / 8) + piece;
  }
  u64 x = a.x;
  const u32 *ask = asked(a, t);
  ask_first(a, ask);
#pragma unroll 2
  for (int step = 0; step < a.chunks; step++, x += 128) {
    if (ask && step + kAsked < a.chunks) ask_for(ask + (step + kAsked) * kTile);
    barrier_wait(r.empty + r.slot * 8, r.parity);
    const u32 to = copy_at + r.slot * kStage;
#if EVEN
    const int bytes = 16;
    const u64 xs = x;
#else
    const int bytes = step * 64 + piece * 8 < a.columns ? 16 : 0;
    const u64 xs = bytes ? x : a.x;
#endif
#pragma unroll
    for (int j = 0; j < COPIES; j++) {
      copy16(to + j * 2048, xs + u64{from[j]} * 16, bytes);
    }
    barrier_arrive_copied(r.full + r.slot * 8);
    advance(r);
  }
}

// The first group of warps.
DEVICE void copy(const Given &a, Ring r) {
  r.parity = 1;
  for (int u = blockIdx.x;; u += gridDim.x) {
    const Tile t = unit_or_none(a, u);
    if (t.expert < 0) break;
    switch (rounded(t.count)) {
#define COPY(n) \
  case n: copy_unit<n / 16>(a, r, t); break;
      EACH_SIZE(COPY)
    }
  }
  copies_wait();
}

// 128-byte rows, eight of them swizzled together.
DEVICE u64 descriptor(u32 address) {
  return (static_cast<u64>((address & 0x3FFFF) >> 4)) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// What a group reads of the weights: a thread's part of the first step, and how many steps there are.
struct Weights {
  const u32 *codes, *scales;
  const float *ratios;  // of block FP8
  int chunks;
};

DEVICE Weights weights_of(const Given &a, const Tile &t, int side) {
  const int tile = min(row_tile(a, t.block, side), a.tiles - 1), thread = threadIdx.x % 128;
  const long long at = (static_cast<long long>(t.expert) * a.tiles + tile) * a.chunks;
  const long long row = static_cast<long long>(t.expert) * ((a.tiles + 1) / 2) + tile / 2;
  return {reinterpret_cast<const u32 *>(a.codes) + at * kTile + thread * 4,
          reinterpret_cast<const u32 *>(a.scales) + at * kTileScales + thread / 4 * (kTileScales / 32),
          reinterpret_cast<const float *>(a.ratios) + row * ((a.chunks + 1) / 2 + 1), a.chunks};
}

DEVICE void load_first(const Weights &w, Codes (&held)[kAhead]) {
#pragma unroll
  for (int i = 0; i < kAhead; i++)
    if (i < w.chunks) held[i] = load_codes(w.codes + i * kTile, w.scales + i * kTileScales, threadIdx.x % 128);
}

// Sums that nothing is added to at the moment, times what block FP8 has between two blocks, see `fragments.Fragments`.
template <int N>
DEVICE void rescale(float (&d)[MOST / 2], float ratio) {
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    not_before(d[i]);
    d[i] *= ratio;
  }
}

// d = w @ x of all columns. `held` has the first steps' codes.
template <int N>
DEVICE void multiply(float (&d)[MOST / 2], Weights w, Codes (&held)[kAhead], Ring &r) {
  const bool speaks = threadIdx.x % 32 == 0;
  const int thread = threadIdx.x % 128;
  u32 pairs[2][8];
  int before = 0;
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = 0.0f;
  decode_half(held[0], 0, pairs[0]);
#if BLOCKS
  float ratio = __ldg(w.ratios);
#endif
#pragma unroll 1
  for (int first = 0; first < w.chunks; first += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int step = first + i;
      if (step >= w.chunks) break;
      barrier_wait(r.full + r.slot * 8, r.parity);
      products_see_copies();
      const u64 x = descriptor(r.stages + r.slot * kStage);
#if BLOCKS
      if (i == 0) {  // two steps are a block
        products_wait<0>();
        rescale<N>(d, ratio);
        ratio = __ldg(w.ratios + first / 2 + 1);
      }
#endif
#pragma unroll
      for (int p = 0; p < 2; p++) {
        products_begin();
        Product<N>::add(d, &pairs[p][0], x + 4 * p);
        Product<N>::add(d, &pairs[p][4], x + 4 * p + 2);
        products_end();
        // All but these are done, and with the registers that are decoded into next.
        products_wait<1>();
        if (p == 0) {
          if (step && speaks) barrier_arrive(r.empty + before * 8);
          decode_half(held[i], 1, pairs[1]);
          if (step + kAhead < w.chunks)
            held[i] = load_codes(w.codes + (i + kAhead) * kTile, w.scales + (i + kAhead) * kTileScales, thread);
        } else if (step + 1 < w.chunks) {
          decode_half(held[(i + 1) % kAhead], 0, pairs[0]);
        }
      }
      before = r.slot;
      advance(r);
    }
    w.codes += kAhead * kTile;
    w.scales += kAhead * kTileScales;
  }
  products_wait<0>();
  if (speaks) barrier_arrive(r.empty + before * 8);
#if BLOCKS
  rescale<N>(d, ratio);
#endif
}

// All groups but the first: 64 rows each, times all tokens of the tile.
DEVICE void use(const Given &a, Ring r, int (*routes)[MOST], float (*shares)[MOST], float4 *other) {
  const int side = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, thread = threadIdx.x % 128;
  const int warp = thread / 32, g = thread % 32 / 4, t4 = thread % 4;
  float d[MOST / 2];
  Codes held[kAhead];
  int turn = 0;
  Tile t = unit_or_none(a, blockIdx.x);
  if (t.expert >= 0) load_first(weights_of(a, t, side), held);
  for (int u = blockIdx.x; t.expert >= 0; u += gridDim.x, turn ^= 1) {
    // Found out while products are under way; its first codes are asked for ahead of what follows them.
    const Tile next = unit_or_none(a, u + gridDim.x);
    const int tile = row_tile(a, t.block, side);
    const Weights w = weights_of(a, t, side);
#if BIAS || ROW_SCALE
    // Of the two rows whose sums a thread has, which are neighbours.
    const long long row0 = static_cast<long long>(t.expert) * a.rows + min(64 * tile + 16 * warp + 2 * g, a.rows - 1);
    const long long row1 =
        static_cast<long long>(t.expert) * a.rows + min(64 * tile + 16 * warp + 2 * g + 1, a.rows - 1);
#endif
#if BIAS
    const float bias0 = bias_at(a, row0), bias1 = bias_at(a, row1);
#endif
#if ROW_SCALE
    const float scale0 = __ldg(reinterpret_cast<const float *>(a.row_scale) + row0);
    const float scale1 = __ldg(reinterpret_cast<const float *>(a.row_scale) + row1);
#endif
    const int mine = threadIdx.x - 128;
    int route = 0;
    float share = 0.0f;
    if (MODE == kSecond) {
      route = load(reinterpret_cast<const int *>(a.order) + t.start + min(mine, t.count - 1));
#if WEIGHTS == 1
      share =
          __uint_as_float(static_cast<u32>(__ldg(reinterpret_cast<const unsigned short *>(a.weights) + route)) << 16);
#else
      share = __ldg(reinterpret_cast<const float *>(a.weights) + route);
#endif
    }
    switch (rounded(t.count)) {
#define CASE(n) \
  case n: multiply<n>(d, w, held, r); break;
      EACH_SIZE(CASE)
    }
#pragma unroll
    for (int i = 0; i < MOST / 2; i++) not_before(d[i]);
    if (next.expert >= 0) load_first(weights_of(a, next, side), held);
    if (MODE == kSecond) {
      if (mine < MOST) routes[turn][mine] = route, shares[turn][mine] = share;
      meet<kUsers>();
    }
#if ROW_SCALE
#pragma unroll
    for (int i = 0; i < MOST / 2; i += 4) d[i] *= scale0, d[i + 1] *= scale0, d[i + 2] *= scale1, d[i + 3] *= scale1;
#endif
#if BIAS
#pragma unroll
    for (int i = 0; i < MOST / 2; i += 4) d[i] += bias0, d[i + 1] += bias0, d[i + 2] += bias1, d[i + 3] += bias1;
#endif
    u8 *y = reinterpret_cast<u8 *>(a.y);
    const int groups = (t.count + 7) / 8;  // of 8 tokens
    const int half = groups / 2;           // those whose gates and ups the first side takes
    if (APART) {
      if (a.chunks <= STAGES) meet<kUsers>();  // nobody still reads
#pragma unroll
      for (int j = 0; j < MOST / 8; j++)
        if (j < groups && (j < half) == (side == 1))
          other[j * 128 + thread] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
      meet<kUsers>();
    }
#pragma unroll
    for (int j = 0; j < MOST / 8; j++) {
      if (j >= groups) break;
      if (APART && (j < half) == (side == 1)) continue;
      float c0 = d[4 * j], c1 = d[4 * j + 1], c2 = d[4 * j + 2], c3 = d[4 * j + 3];
      const int token = 8 * j + g;
      if (MODE == kFirst && kGated && !APART) {
        const u32 v = transposed(packed(activate(a, c0, c2), activate(a, c1, c3)));
        const int n = tile * 32 + 8 * warp + 2 * t4;
        if (token < t.count && n < a.width)
          *reinterpret_cast<u32 *>(y + 2 * (static_cast<long long>(t.start + token) * a.width + n)) = v;
        continue;
      }
      if (MODE == kFirst && APART) {
        const float4 o = other[j * 128 + thread];
        c0 = side ? activate(a, o.x, c0) : activate(a, c0, o.x);
        c1 = side ? activate(a, o.y, c1) : activate(a, c1, o.y);
        c2 = side ? activate(a, o.z, c2) : activate(a, c2, o.z);
        c3 = side ? activate(a, o.w, c3) : activate(a, c3, o.w);
      } else if (MODE == kFirst) {
        c0 = activate(a, c0, c0), c1 = activate(a, c1, c1), c2 = activate(a, c2, c2), c3 = activate(a, c3, c3);
      }
      long long to = t.start + token;
      if (MODE == kSecond) {
        const float2 s = *reinterpret_cast<const float2 *>(&shares[turn][8 * j + 2 * t4]);
        c0 *= s.x, c1 *= s.y, c2 *= s.x, c3 *= s.y;
        to = routes[turn][token];
      }
      const u32 even = transposed(packed(c0, c1)), odd = transposed(packed(c2, c3));
      const uint2 v = make_uint2(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
      const int n = (APART ? t.block : tile) * 64 + 16 * warp + 4 * t4;
      if (token < t.count && n < a.width) *reinterpret_cast<uint2 *>(y + 2 * (to * a.width + n)) = v;
    }
    t = next;
  }
}

extern "C" __global__ void __launch_bounds__(128 + kUsers, 1) wide(const __grid_constant__ Given a) {
  DYNAMIC_SHARED(raw);
  __shared__ u64 bars[2 * STAGES];
  __shared__ int routes[2][MOST];
  __shared__ __align__(8) float shares[2][MOST];
  Ring r;
  r.stages = (shared_address(raw) + 1023) & ~1023u;
  r.full = shared_address(bars);
  r.empty = r.full + 8 * STAGES;
  r.slot = 0;
  r.parity = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(r.full + 8 * i, 128);         // every copying thread
      barrier_init(r.empty + 8 * i, 4 * USERS);  // every other warp
    }
    barriers_are_there();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<COPY_REGISTERS>();
    if (MODE == kLinear) ask_first(a, asked(a, unit_or_none(a, blockIdx.x)));
    wait_ahead();
    copy(a, r);
  } else {
    more_registers<USE_REGISTERS>();
    wait_ahead();  // weights and biases may be new, too
    u8 *stages = raw + (r.stages - shared_address(raw));
    use(a, r, routes, shares, reinterpret_cast<float4 *>(stages + STAGES * kStage));
  }
}
