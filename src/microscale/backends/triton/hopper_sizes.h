// What a step of 64 columns takes of shared memory where groups of warps decode. `hopper_stages.h` comes behind it.

constexpr int kTile = 512 * BITS;                     // bytes of 64 rows by 64 columns,
constexpr int kTileScales = E4M3_SCALES ? 256 : 128;  // and of their scales

// Behind 64 columns of all tokens, which come 16 at a time, are as many of the weights, and behind these their scales.
DEVICE constexpr int codes_behind(int tokens) { return (tokens + 15) / 16 * 2048; }
DEVICE constexpr int scales_behind(int tokens, int tiles) { return codes_behind(tokens) + tiles * kTile; }
DEVICE constexpr int step_of(int tokens, int tiles) {
  return (scales_behind(tokens, tiles) + tiles * kTileScales + 1023) / 1024 * 1024;
}

constexpr int kCodes = codes_behind(MOST), kScales = scales_behind(MOST, TILES);
constexpr int kUsual = step_of(MOST, TILES), kOther = step_of(REST, REST_TILES);
constexpr int kStage = kUsual > kOther ? kUsual : kOther;  // bytes of a step in shared memory
