// Divisions of `hopper_fp8.cu`.

// v / scale to the bit, for every number of a block that has this scale, and with fewer instructions: what is left of v
// behind a first quotient mends it. `factor`, a power of two for both, keeps that from vanishing; `inverse` is 1 /
// scale.
struct Divisor {
  float factor, scale, inverse;
};

DEVICE Divisor divisor_of(float scale) {
  constexpr float kLeast = 8.67361737988403547e-19f, kMost = 1.152921504606846976e18f;        // 2^-60, 2^60
  constexpr float kUp = 1.208925819614629174706176e24f, kDown = 8.27180612553027674871e-25f;  // 2^80, 2^-80
  Divisor d;
  d.factor = scale < kLeast ? kUp : scale > kMost ? kDown : 1.0f;
  d.scale = scale * d.factor;
  d.inverse = 1.0f / d.scale;
  return d;
}

DEVICE float quotient(float v, const Divisor &d) {
  v *= d.factor;
  const float q = v * d.inverse;
  return fmaf(fmaf(-q, d.scale, v), d.inverse, q);
}
