// What one instruction set level offers for the operators between a token's products. As table.h, this is included by
// units compiled for a level, which are reached through it alone.
#pragma once
#include <stdint.h>

#include "../microscale.h"

namespace microscale {

// A row's norm: y = w * v / sqrt(mean of v^2 + epsilon), n of each, where v = x + more.
struct SmallNorm {
  int dtype;  // of all but w
  const void *x, *more;
  void *sum;  // v goes there, rounded, and is read again; more null: v = x, and nothing is written
  int weight_dtype;
  const void *w;
  int64_t n;
  float epsilon;
  int twice;  // round before w multiplies, too
  void *y;
};

struct Small {
  void (*norm)(const SmallNorm *);
  // Pairs (x[i], x[half + i]) turned by angles of these cosines and sines, each product rounded; y may be x.
  void (*turn)(int dtype, const void *x, int64_t half, const void *cos, const void *sin, void *y);
  // y = activation(gate) * up, the activation rounded; of it only the kind and the parameters count.
  void (*gate)(int dtype, const struct ms_activation *activation, const void *gate, const void *up, int64_t n, void *y);
  void (*load)(int dtype, const void *x, int64_t n, float *out);  // n numbers of `dtype` to float32
  void (*round)(int dtype, float *v, int64_t n);                  // to the nearest numbers of `dtype`
  // y of dtype `to` = x of `dtype` as it reads back from a format of ms_stored, but for NVFP4's multiplier where
  // `outer` is not null, and takes it.
  void (*stored)(int format, int dtype, const void *x, int64_t n, int to, void *y, float *outer);
};

extern const Small plain_small, avx2_small, avx512_small;

}  // namespace microscale
