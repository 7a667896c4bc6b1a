// Steps in shared memory, and the units of a program: what all kernels share whose groups of warps have no barrier
// between them. `Tile`, a unit of work, and kStage, the bytes of a step, come before it.

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

// 128-byte rows, eight of them swizzled together.
DEVICE u64 descriptor(u32 address) {
  return (static_cast<u64>((address & 0x3FFFF) >> 4)) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
