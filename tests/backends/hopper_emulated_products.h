// Products of `hopper_emulated.h`, which includes this: they happen when they are waited for.
static std::deque<std::vector<std::function<void()>>> under_way_[1024];  // of each thread, groups of products
static std::vector<std::function<void()>> group_[1024];
static void products_begin() {}
static void products_end() {
  under_way_[threadIdx.x].push_back(std::move(group_[threadIdx.x]));
  group_[threadIdx.x].clear();
}
template <int LEFT>
void products_wait() {
  const u32 me = threadIdx.x;
  while (under_way_[me].size() > LEFT) {
    const auto group = std::move(under_way_[me].front());
    under_way_[me].pop_front();
    for (const auto &product : group) product();
  }
}
static void not_before(float &) {}
static void unknown(u64 &) {}
static void unknown(u32 &) {}
static void needs(u32) {}
template <int COUNT>
void fewer_registers() {}
template <int COUNT>
void more_registers() {}

static float wide_float(u32 bf16) {
  const u32 bits = bf16 << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
static u32 given_[1024][4];

// 64 rows, of which a warp has 16 in its lanes, times N tokens that lie in rows of 128 swizzled bytes, and 16 columns.
template <int N>
void multiply_now(float *d, const u32 *w, u64 x, bool more) {
  const u32 me = threadIdx.x, group = me / 128;
  for (int i = 0; i < 4; i++) given_[me][i] = w[i];
  meet_all(100 + group, 128);
  const u32 quad = me / 4 * 4, base = static_cast<u32>(x & 0x3FFF) << 4;
  for (int j = 0; j < N / 8; j++)
    for (int c = 0; c < 2; c++) {
      const u32 token = 8 * j + 2 * (me % 4) + c;
      double sum[2] = {0, 0};
      for (u32 k = 0; k < 16; k++) {
        const u32 linear = (base & ~1023u) + token * 128 + (base & 127) + 2 * k;
        const u32 swizzled = linear ^ (token % 8 << 4);
        unsigned short v;
        std::memcpy(&v, at(swizzled), 2);
        const u32 *pairs = given_[quad + k % 8 / 2];
        for (int odd = 0; odd < 2; odd++)
          sum[odd] +=
              static_cast<double>(wide_float(pairs[2 * (k / 8) + odd] >> 16 * (k % 2) & 0xFFFF)) * wide_float(v);
      }
      for (int odd = 0; odd < 2; odd++) {
        float &to = d[4 * j + 2 * odd + c];
        to = static_cast<float>((more ? to : 0.0f) + sum[odd]);
      }
    }
  meet_all(200 + group, 128);
}

template <int N, int SUMS>
void multiply_add(float (&d)[SUMS], const u32 *w, u64 x, bool more) {
  group_[threadIdx.x].push_back([sums = &d[0], w, x, more] { multiply_now<N>(sums, w, x, more); });
}

static float e4m3(u8 code) {
  const int field = code >> 3 & 15, fraction = code & 7;
  if ((code & 0x7F) == 0x7F) return NAN;
  const float v = field ? std::ldexp(8.0f + fraction, field - 10) : std::ldexp(1.0f * fraction, -9);
  return code & 0x80 ? -v : v;
}

// 64 rows of codes times N, both in rows of 128 swizzled bytes.
template <int N>
void multiply_codes_now(float *d, u64 x, u64 w) {
  const u32 me = threadIdx.x, row = me % 128 / 32 * 16 + me % 32 / 4;
  const auto code = [](u64 of, u32 row, u32 k) {
    const u32 base = static_cast<u32>(of & 0x3FFF) << 4;
    return e4m3(*at((base + row * 128 + k) ^ (row % 8 << 4)));
  };
  meet_all(100 + me / 128, 128);
  for (u32 j = 0; j < N / 8; j++)
    for (u32 i = 0; i < 4; i++) {
      double sum = 0;
      for (u32 k = 0; k < 128; k++)
        sum += static_cast<double>(code(x, row + i / 2 * 8, k)) * code(w, 8 * j + 2 * (me % 4) + i % 2, k);
      d[4 * j + i] = static_cast<float>(sum);
    }
  meet_all(200 + me / 128, 128);
}

template <int N, int SUMS>
void multiply_codes(float (&d)[SUMS], u64 x, u64 w) {
  group_[threadIdx.x].push_back([sums = &d[0], x, w] { multiply_codes_now<N>(sums, x, w); });
}
