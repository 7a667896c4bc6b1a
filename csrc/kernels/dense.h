// Products with weights as they lie in a checkpoint: each column's numbers one after another, so that a product is a
// walk along one or a few columns at a time. A vector V has
//   kLanes, kParts   numbers in a vector, and vectors that one result is summed in, in turn
//   kRows            rows that are multiplied together, at most
//   columns(rows)    columns at a time for so many rows: one alone is read as one stream, several share the rows' loads
//   weights, operands, multiply, total
// A result is summed in the same order whatever else is computed beside it.
#pragma once
#include "dense_table.h"
#include "rows.h"

namespace microscale {
namespace {

constexpr int64_t dtype_bytes(int dtype) { return dtype == MS_FP32 ? 4 : 2; }

template <class V, int kDtype, int R, int C>
inline void dense_block(const DenseProduct &p, int64_t row, int64_t column) {
  using Operand = typename V::Operand;
  using Sum = typename V::Sum;
  constexpr int64_t kBytes = dtype_bytes(kDtype), kStep = V::kLanes * V::kParts;
  const uint8_t *w[C];
  const Operand *x[R];
  Sum sums[R][C][V::kParts];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) w[c] = p.weights + (column + c) * p.weight_step;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x[r] = static_cast<const Operand *>(p.rows[row + r]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
      for (int part = 0; part < V::kParts; ++part) sums[r][c][part] = V::zero();
  }
  int64_t i = 0;
  for (; i + kStep <= p.k; i += kStep) {
#pragma GCC unroll 8
    for (int part = 0; part < V::kParts; ++part) {
      const int64_t at = i + part * V::kLanes;
      typename V::Weights v[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) v[c] = V::template weights<kDtype>(w[c] + at * kBytes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto a = V::operands(x[r] + at);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[r][c][part] = V::multiply(sums[r][c][part], v[c], a);
      }
    }
  }
#pragma GCC unroll 8
  for (int part = 0; part < V::kParts; ++part) {  // what is left of K
    const int64_t at = i + part * V::kLanes, left = p.k - at;
    if (left <= 0) break;
    const int64_t count = left < V::kLanes ? left : V::kLanes;
    typename V::Weights v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = V::template weights<kDtype>(w[c] + at * kBytes, count);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto a = V::operands(x[r] + at, count);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c][part] = V::multiply(sums[r][c][part], v[c], a);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) p.sums[(row + r) * p.n + column + c] = V::total(sums[r][c]);
}

// R rows from `row` on, columns [first, end).
template <class V, int kDtype, int R>
void dense_rows(const DenseProduct &p, int64_t row, int64_t first, int64_t end) {
  constexpr int C = V::columns(R);
  int64_t column = first;
  for (; column + C <= end; column += C) dense_block<V, kDtype, R, C>(p, row, column);
  if constexpr (C > 1)
    for (; column < end; ++column) dense_block<V, kDtype, R, 1>(p, row, column);
}

template <class V, int kDtype, int R>
inline void dense_last_rows(const DenseProduct &p, int64_t row, int64_t first, int64_t end) {
  if (p.m - row == R)
    dense_rows<V, kDtype, R>(p, row, first, end);
  else if constexpr (R > 1)
    dense_last_rows<V, kDtype, R - 1>(p, row, first, end);
}

template <class V, int kDtype>
void dense_product(const DenseProduct *product) {
  const DenseProduct &p = *product;
  // Columns that stay in a small L2 cache until all rows have used them.
  constexpr int64_t kNear = 96 << 10, kColumns = 12;  // a multiple of every V::columns
  const int64_t column_bytes = p.k * dtype_bytes(kDtype);
  const int64_t near = p.m <= V::kRows || column_bytes == 0 ? p.n : kNear / column_bytes / kColumns * kColumns;
  const int64_t each = near < kColumns ? kColumns : near;
  for (int64_t first = 0; first < p.n; first += each) {
    const int64_t end = first + each < p.n ? first + each : p.n;
    int64_t row = 0;
    for (; row + V::kRows <= p.m; row += V::kRows) dense_rows<V, kDtype, V::kRows>(p, row, first, end);
    dense_last_rows<V, kDtype, V::kRows>(p, row, first, end);
  }
  for (int64_t row = 0; row < p.m; ++row)
    for (int64_t i = 0; i < p.n; i += kLanes) {
      const int64_t count = lanes_left(p.n, i);
      f32x16 v = load_as(MS_FP32, p.sums + row * p.n, i, count);
      if (p.bias) v = v + load_as(kDtype, p.bias, i, count);
      store_as(p.dtype, p.y + row * p.y_step, i, v, count);
    }
}

}  // namespace
}  // namespace microscale
