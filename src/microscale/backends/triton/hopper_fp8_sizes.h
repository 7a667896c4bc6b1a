// What steps of 128 columns of FP8 codes take of shared memory. `hopper_stages.h` comes behind it.

constexpr int kTile = 64 * 128;             // bytes of 64 rows of weights,
constexpr int kCodes = MOST * 128;          // behind the codes of all tokens
constexpr int kStage = kCodes + 4 * kTile;  // bytes of a step in shared memory

// Behind all stages, the scales of four steps at a time: of each token, and of each of those steps its tiles'. Steps
// begin such a four at any stage, and they are still read when the next ones come to it: each stage has two places.
constexpr int kFour = 4;
constexpr int kOfTiles = MOST * kFour * 4, kFourScales = kOfTiles + kFour * 4 * 4;
constexpr int kAllScales = 2 * STAGES * kFourScales;
