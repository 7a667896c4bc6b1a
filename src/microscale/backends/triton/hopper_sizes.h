// What a step of 64 columns takes of shared memory where groups of warps decode. `hopper_stages.h` comes behind it.

constexpr int kTile = 512 * BITS;                     // bytes of 64 rows by 64 columns,
constexpr int kTileScales = E4M3_SCALES ? 256 : 128;  // and of their scales
constexpr int kCodes = (MOST + 15) / 16 * 2048;       // behind 64 columns of all tokens, which come 16 at a time,
constexpr int kScales = kCodes + TILES * kTile;       // as many columns of the weights, and behind these their scales:
constexpr int kStage = (kScales + TILES * kTileScales + 1023) / 1024 * 1024;  // bytes of a step in shared memory
