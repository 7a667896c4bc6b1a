// What sums of a thread meet behind their products: rows' biases and factors, and the order in which results are
// stored. `hopper_unit.h` and `hopper_linear.h` come behind it.

// What a thread needs of the rows of one of its tiles, which are neighbours.
struct Rows {
  float bias0, bias1, scale0, scale1;
};

// Of its two rows the first.
DEVICE int first_row(int tile) { return 64 * tile + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 * 2; }

// Biases are 1 bfloat16 or 2 float32.
template <int BIAS_KIND>
DEVICE float bias_at(u64 bias, long long i) {
  if (BIAS_KIND == 1)
    return __uint_as_float(static_cast<u32>(__ldg(reinterpret_cast<const unsigned short *>(bias) + i)) << 16);
  return __ldg(reinterpret_cast<const float *>(bias) + i);
}

// Biases of kind 0 are none, and so are factors that are not SCALED.
template <int BIAS_KIND, bool SCALED>
DEVICE Rows rows_at(u64 bias, u64 row_scale, long long row0, long long row1) {
  Rows r = {0.0f, 0.0f, 1.0f, 1.0f};
  if constexpr (BIAS_KIND != 0) r.bias0 = bias_at<BIAS_KIND>(bias, row0), r.bias1 = bias_at<BIAS_KIND>(bias, row1);
  if constexpr (SCALED) {
    r.scale0 = __ldg(reinterpret_cast<const float *>(row_scale) + row0);
    r.scale1 = __ldg(reinterpret_cast<const float *>(row_scale) + row1);
  }
  return r;
}

// Sums of two tokens and the two rows.
template <int BIAS_KIND, bool SCALED>
DEVICE void finish(float (&c)[4], const Rows &r) {
  if constexpr (SCALED) c[0] *= r.scale0, c[1] *= r.scale0, c[2] *= r.scale1, c[3] *= r.scale1;
  if constexpr (BIAS_KIND != 0) c[0] += r.bias0, c[1] += r.bias0, c[2] += r.bias1, c[3] += r.bias1;
}

// The four results of one token that a thread stores, of those that it has with its neighbours.
DEVICE uint2 of_one_token(const float (&c)[4]) {
  const u32 even = transposed(packed(c[0], c[1])), odd = transposed(packed(c[2], c[3]));
  return make_uint2(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
}
