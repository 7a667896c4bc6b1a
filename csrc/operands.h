// The rows of an activation matrix as a level's kernels want them.
#pragma once
#include <algorithm>

#include "buffer.h"
#include "kernels/table.h"
#include "layout.h"

namespace microscale {

inline int64_t element_bytes(int dtype) { return dtype == MS_FP32 ? 4 : 2; }
// Sums [m][stride], n of them a row, times their rows' multipliers: factor[row[i]], or factor[i] where `row` is null.
void scale_rows(float *sums, int64_t stride, int64_t m, int64_t n, const float *factor, const int64_t *row);
inline int64_t padded_k(int64_t k) { return (k + 31) / 32 * 32; }
// Rows for which there must be room where products put sums: kernels may store whole tiles of 16.
inline int64_t whole_rows(int64_t m) { return (m + 15) / 16 * 16; }

// Where the operands of rows lie in memory of our own. Rows that are multiplied together are a group: group g is `size`
// rows, and `first` rows are in the groups before it.
//
// Plain: row after row, a cache line between them, so that rows a power of two long do not all fall into one cache set.
// Tiled: tiles of up to 16 rows, all of a group's equally many (tile_rows()); in a tile, 32 k of each row, then the
// next 32 k of each row. The last tile is whole: there is room for what the rows do not fill.
struct OperandLayout {
  int operand;  // MS_BF16 or MS_FP32
  bool tiled;
  int64_t k;

  int64_t bytes(int64_t rows, int64_t groups) const { return (rows + (tiled ? 15 * groups : 0)) * row_bytes(); }
  int64_t row_bytes() const { return padded_k(k) * element_bytes(operand) + (tiled ? 0 : 64); }
  // Bytes from the start of all groups to column 0 of row `i` of group `g`, which has `size` rows.
  int64_t offset(int64_t g, int64_t first, int64_t size, int64_t i) const {
    if (!tiled) return (first + i) * row_bytes();
    const int64_t rows = tile_rows(size);
    return (first + 15 * g + i / rows * rows) * row_bytes() + i % rows * 64;
  }
  // f(i, offset()) of each row, in order: divides once for a tile.
  template <class F>
  void each_row(int64_t g, int64_t first, int64_t size, F f) const {
    const int64_t rows = tiled ? tile_rows(size) : size, apart = tiled ? 64 : row_bytes();
    for (int64_t tile = 0; tile < size; tile += rows) {
      const int64_t start = offset(g, first, size, tile), end = std::min(tile + rows, size);
      for (int64_t i = tile; i < end; ++i) f(i, start + (i - tile) * apart);
    }
  }
  // Bytes from 32 k of a row to its next 32 k.
  int64_t step(int64_t size) const {
    if (!tiled) return 32 * element_bytes(operand);
    return 64 * tile_rows(size);
  }
};

// Rows of an activation matrix that become operands.
struct Source {
  int dtype;
  const uint8_t *x;
  int64_t stride;       // bytes
  const int64_t *row;   // of x, for each operand row; null: the same
  const float *factor;  // of each operand row; null: 1

  // Rows [from, to) of group `group`, in which rows [first, first + size) are, to `out`, where all groups begin. Few
  // rows at a time, best those of one tile.
  void convert(const Kernels &kernels, const OperandLayout &layout, int64_t group, int64_t first, int64_t size,
               int64_t from, int64_t to, uint8_t *out) const;
};

// Rows, used where they are if the kernels can and converted otherwise.
class Operands {
 public:
  // `rows` rows in groups that are multiplied together: group g is rows [first[g], first[g + 1]). `source[i]` is the
  // row of x that row i takes, null: i itself. `factor[i]` multiplies it, null: 1. False: no memory.
  bool prepare(const Kernels &kernels, int dtype, const void *x, int64_t x_stride, int64_t k, int64_t rows,
               const int64_t *first, int64_t groups, const int64_t *source, const float *factor, int threads);
  const void *const *rows() const { return rows_.get(); }

 private:
  Buffer<const void *> rows_;
  Buffer<uint8_t> converted_;
};

}  // namespace microscale
