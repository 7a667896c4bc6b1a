// Experts on Hopper whose weights and activations are FP8 codes: one group of four warps copies codes into shared
// memory, two others multiply 64 tokens each by 256 rows of weights, 128 columns at a time, and add what comes of it to
// float32 sums, times both scales, as `gemm.product_of_codes` does. `hopper_text.py` writes the constants in capitals
// and `Product` above this text; `hopper_ptx.h`, `hopper_rows.h`, `hopper_unit.h`, `hopper_fp8_sizes.h`,
// `hopper_stages.h`, `hopper_lists.h` if there are lists, and `hopper_tiles.h` come before it, `hopper_groups.h` behind
// it.
//
// Tokens are the rows of products, so a thread has all columns of two tokens that its three neighbours do not: of w13
// these are gates and their ups, and what they become is rounded to codes with no word to another warp.

static_assert(MOST == 128 && USERS == 2 && EACH == 2 && APART && GATED, "64 tokens a group; 128 gates, and their ups");

constexpr int kTurn = 1;       // steps that are counted and waited for at a time
constexpr int kAskers = 4;     // who arrive besides all threads: a warp asks for a tile of weights each
constexpr int kColumns = 128;  // of a step, and of results that share a scale

// A unit's tile of 64 rows in shared memory: of w13 two of gates, then their ups.
DEVICE int tile_at(const Given &a, const Tile &t, int slot) {
  const int tile = t.product == 0 ? 2 * t.block + slot % 2 + slot / 2 * (a.of[0].width / 64) : t.first + slot;
  return min(tile, operands(a, t).tiles - 1);
}

// Bytes from one token's scales to the next one's, of whole fours of steps.
DEVICE u32 scales_stride(int chunks) { return static_cast<u32>((chunks + kFour - 1) / kFour * kFour * 4); }

// Where the scales of four steps lie, at whose first one the ring is; `parity`: of the stage's uses.
DEVICE u32 four_scales(const Ring &r, u32 parity) {
  return r.first + STAGES * kStage + ((r.bar - r.full) / 4 + parity) * kFourScales;
}

// What a thread copies besides tokens' codes: a token's scales and, of the first threads, a tile's.
struct ScalesAhead {
  u64 token, tile;
  u32 further;  // from one step's of a tile to the next one's
  bool has_token, has_tile;
};

DEVICE ScalesAhead scales_of(const Given &a, const Tile &t) {
  const Operands &o = operands(a, t);
  const int thread = threadIdx.x;
  int token = t.start + min(thread, t.count - 1);
  if (t.product == 0) token = route_at(a, token) / TOP_K;
  const u64 expert = static_cast<u64>(t.expert) * static_cast<u32>(o.chunks * o.scale_rows);
  const int block = tile_at(a, t, min(thread, 3)) / 2;
  return {o.x_scales + static_cast<u64>(token) * scales_stride(o.chunks), o.scales + 4 * (expert + block),
          static_cast<u32>(o.scale_rows * 4), thread < t.count, thread < 4};
}

// All columns of a unit: its tokens, 16 bytes by each thread, and the weights, 64 rows by a warp.
DEVICE void copy_unit(const Given &a, Ring &r, const Tile &t) {
  const Operands &o = operands(a, t);
  const int piece = threadIdx.x % 8, token = threadIdx.x / 8;
  const u32 copy_at = token * 128 + ((piece ^ (token % 8)) << 4);
  u64 x[MOST / 16];
#pragma unroll
  for (int j = 0; j < MOST / 16; j++) {
    u32 which = t.start + min(token + 16 * j, t.count - 1);
    if (t.product == 0) which = static_cast<u32>(route_at(a, which)) / TOP_K;
    x[j] = o.x + static_cast<u64>(which) * static_cast<u32>(o.chunks * kColumns) + 16 * piece;
    unknown(x[j]);
  }
  ScalesAhead s = scales_of(a, t);
  const void *boxes = a.boxes[t.product];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int row32 = t.expert * (o.rows / 32) + 2 * tile_at(a, t, warp);
  const int chunks = o.chunks;
#pragma unroll 1
  for (int done = 0; done < chunks; done += kFour) {
    u32 scales = 0;
#pragma unroll
    for (int i = 0; i < kFour; i++) {
      if (done + i >= chunks) break;
      barrier_wait(r.bar + kEmpty, r.parity);
      if (elected()) {
        barrier_expect(r.bar, kTile);
        copy_rows(r.stage + kCodes + warp * kTile, boxes, (done + i) * (kColumns / 2), row32, r.bar);
      }
      __syncwarp();
      if (i == 0) scales = four_scales(r, r.parity ^ 1);
      if (i == 0 && s.has_token) copy16(scales + threadIdx.x * 16, s.token, 16);
      if (s.has_tile) copy4(scales + kOfTiles + (4 * i + threadIdx.x) * 4, s.tile + u64{s.further} * i);
#pragma unroll
      for (int j = 0; j < MOST / 16; j++)
        if (16 * j < t.count) copy16(r.stage + copy_at + j * 2048, x[j] + i * kColumns, 16);
      barrier_arrive_copied(r.bar);
      advance(r);
    }
#pragma unroll
    for (u64 &v : x) v += kFour * kColumns;
    s.token += kFour * 4, s.tile += u64{s.further} * kFour;
  }
}

// A thread's row of a warp's 16, and the other one is 8 further; its columns of 32 are 8 that follow one another.
DEVICE int own_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
DEVICE int own_column() { return 8 * (threadIdx.x % 4); }

DEVICE float shared_float(u32 at) { return __uint_as_float(shared4(at)); }

// d = x @ w of all columns; d[h] of the first or the last 128 rows of weights.
DEVICE void multiply(Sums &d, const Given &a, const Tile &t, int side, Ring &r) {
  const int chunks = operands(a, t).chunks;
  const u32 row = (64 * side + own_row()) * 16;
  u32 scales = 0;
  float part[MOST / 2];
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (float &v : d[h]) v = 0.0f;
#pragma unroll 1
  for (int step = 0; step < chunks; step++) {
    barrier_wait(r.bar, r.parity);
    products_see_copies();
    const int i = step % kFour;
    if (i == 0) scales = four_scales(r, r.parity);
    const float token[2] = {shared_float(scales + row + 4 * i), shared_float(scales + row + 128 + 4 * i)};
    const float tile[2] = {shared_float(scales + kOfTiles + 16 * i), shared_float(scales + kOfTiles + 16 * i + 8)};
    const u64 x = descriptor(r.stage + side * 64 * 128), w = descriptor(r.stage + kCodes);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      products_begin();
      Product<128>::codes(part, x, w + h * (2 * kTile / 16));
      products_end();
      const float scale[2] = {tile[h] * token[0], tile[h] * token[1]};
      products_wait<0>();
      if (h == 1 && threadIdx.x % 32 == 0) barrier_arrive(r.bar + kEmpty);
#pragma unroll
      for (int i = 0; i < MOST / 2; i++) {
        not_before(part[i]);
        d[h][i] = fmaf(part[i], scale[i / 2 % 2], d[h][i]);
      }
    }
    advance(r);
  }
}

// A row's bias, or 0.
template <int KIND_OF>
DEVICE float bias_of(const Given &a, const Tile &t, int row) {
  if constexpr (kBiases[KIND_OF] == 0) return 0.0f;
  const Operands &o = a.of[KIND_OF];
  return bias_at<kBiases[KIND_OF]>(o.bias, static_cast<long long>(t.expert) * o.rows + min(row, o.rows - 1));
}

DEVICE u32 magnitude(float v) { return __float_as_uint(v) & 0x7FFFFFFF; }

// The greatest that four neighbours have.
DEVICE u32 greatest(u32 v) {
  v = max(v, __shfl_xor_sync(~0u, v, 1));
  return max(v, __shfl_xor_sync(~0u, v, 2));
}

// Of a token the scale of the columns that have this magnitude. Where a number is not finite its code becomes NaN, and
// so do the products that it has part in.
DEVICE float scale_of(u32 most) {
  const float scale = __uint_as_float(most) / 448.0f;
  return scale == 0.0f ? 1.0f : scale;
}

// Of w13: what becomes of a gate and its up, as codes with a scale of each token.
DEVICE void store_codes(Sums &d, const Given &a, const Tile &t, int side) {
  const Operands &o = a.of[0];
  const int first = kColumns * t.block + own_column();
  u32 most[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < MOST / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = first + j / 4 * 32 + j % 4 * 2 + i % 2;
      const float gate = d[0][4 * j + i] + bias_of<0>(a, t, column);
      const float up = d[1][4 * j + i] + bias_of<0>(a, t, o.width + column);
      d[0][4 * j + i] = activate(a, gate, up);
      most[i / 2] = max(most[i / 2], magnitude(d[0][4 * j + i]));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int token = 64 * side + own_row() + 8 * half;
    const bool there = token < t.count;
    const u64 place = static_cast<u64>(t.start + token);
    const float scale = scale_of(greatest(most[half]));
    const Divisor divisor = divisor_of(scale);
    store4_if(there && threadIdx.x % 4 == 0, o.y_scales + place * scales_stride(o.blocks) + 4 * t.block,
              __float_as_uint(scale));
#pragma unroll
    for (int g = 0; g < 4; g++) {
      u32 pairs[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float *c = &d[0][16 * g + 4 * j + 2 * half];
        pairs[j] = e4m3_pair(quotient(c[0], divisor), quotient(c[1], divisor));
      }
      store8_if(there, o.y + place * o.width + first + 32 * g,
                make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16));
    }
  }
}

// Of w2: each token's share, in bfloat16.
DEVICE void store_shares(const Sums &d, const Given &a, const Tile &t, int side, const Route (&routes)[2]) {
  const Operands &o = a.of[1];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const bool there = 64 * side + own_row() + 8 * half < t.count;
    const u64 y = o.y + 2 * static_cast<u64>(routes[half].to) * o.width;
#pragma unroll
    for (int g = 0; g < 8; g++) {
      const int column = 64 * t.first + 32 * g + own_column();
      u32 pairs[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float *c = &d[g / 4][g % 4 * 16 + 4 * j + 2 * half];
        pairs[j] = packed((c[0] + bias_of<1>(a, t, column + 2 * j)) * routes[half].share,
                          (c[1] + bias_of<1>(a, t, column + 2 * j + 1)) * routes[half].share);
      }
      const bool stored = there && column < o.width;
      store8_if(stored, y + 2 * column, make_uint2(pairs[0], pairs[1]));
      store8_if(stored, y + 2 * column + 8, make_uint2(pairs[2], pairs[3]));
    }
  }
}

// Whether a group has tokens in a unit.
DEVICE bool takes_part(const Given &, const Tile &t, int side) { return 64 * side < t.count; }

DEVICE void use_unit(const Given &a, const Tile &t, int side, int, Ring &r) {
  const Route routes[2] = {route_of(a, t, 64 * side + own_row()), route_of(a, t, 64 * side + own_row() + 8)};
  Sums d;
  multiply(d, a, t, side, r);
  if (t.product == 0) {
    store_codes(d, a, t, side);
    tell(a, t, side);
  } else {
    store_shares(d, a, t, side, routes);
  }
}
