// Packing against an independent reading of the formulas in microscale.h, bit by bit; headers and arguments
// that lie.
//
// From csrc:
//   g++ -std=c++20 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wall -Wextra -I.
//       -pthread tests/test_pack.cc pack.cc parallel.cc -o test_pack
#include <algorithm>

#include "check.h"
#include "tensor.h"

namespace {

// Packed: the formulas of microscale.h, word for word. `k` is within the tile.
int packed_code(const uint8_t *tile, int bits, int n, int k) {
  const int p = k % 2;
  const auto word = [&](int index) {
    uint32_t w;
    std::memcpy(&w, tile + 4 * index, 4);
    return w >> (16 * p) & 0xffff;  // the half of k's parity
  };
  if (bits == 8) {
    const int q = k / 4, j = (k - 4 * q - p) / 2;
    return static_cast<int>(word(16 * q + n) >> (8 * j) & 0xff);
  }
  const int q = k / 8, j = (k - 8 * q - p) / 2;
  int code = static_cast<int>(word(16 * q + n) >> (4 * j) & 15);
  if (bits == 6) {
    const int high = k / 16, i = (k - 16 * high - p) / 2;
    code |= static_cast<int>(word(64 + 16 * high + n) >> (2 * i) & 3) << 4;
  }
  return code;
}

// Every byte of the packed form is what the header file says, padding included.
void check_layout(Tensor &t, const Buffer &out) {
  const Facts &facts = kFacts[t.format];
  const int64_t tiles = up(t.k, 32), panels = up(t.n, 16), halves = 32 / facts.columns;
  const bool floats = t.format == MS_FP8_BLOCK128;
  const uint8_t *at = out.data() + 64;
  int64_t wrong_codes = 0, wrong_scales = 0, dirty = 0;
  for (int64_t e = 0; e < t.e; ++e) {
    for (int64_t first = 0; first < panels; first += 4) {
      const int64_t count = panels - first < 4 ? panels - first : 4;
      const uint8_t *start = at;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t p = first; p < first + count; ++p, at += facts.tile) {
          for (int i = 0; i < 16 * 32; ++i) {
            const int64_t n = 16 * p + i % 16, k = 32 * tile + i / 16;
            const int want = n < t.n && k < t.k ? canonical_code(t.row(e, n), facts.bits, k) : 0;
            wrong_codes += packed_code(at, facts.bits, i % 16, i / 16) != want;
          }
        }
        for (int64_t p = first; p < first + count && !floats; ++p) {
          for (int64_t b = tile * halves; b < (tile + 1) * halves; ++b) {
            for (int c = 0; c < 16; ++c, ++at) {
              const int64_t n = 16 * p + c;
              wrong_scales += *at != (n < t.n && b < t.blocks_k ? *t.scale(e, n, b) : 0);
            }
          }
        }
      }
      for (int64_t p = first; p < first + count && floats; ++p, at += 4 * t.blocks_k) {
        const uint8_t *want = t.scale(e, p / 8, 0);
        wrong_scales += !std::equal(want, want + 4 * t.blocks_k, at);
      }
      for (; (at - start) % 64 != 0; ++at) dirty += *at != 0;
    }
  }
  CHECK_IN(at == out.data() + out.bytes, SHAPE(t));
  CHECK_IN(wrong_codes == 0, SHAPE(t));
  CHECK_IN(wrong_scales == 0, SHAPE(t));
  CHECK_IN(dirty == 0, SHAPE(t));
}

void check_shape(int format, int64_t e, int64_t n, int64_t k) {
  Tensor t(format, e, n, k);
  t.randomize(static_cast<unsigned>(((format * 4 + e) * 4096 + n) * 4096 + k));
  const int64_t bytes = ms_packed_bytes(format, e, n, k);
  CHECK_IN(bytes == packed_bytes(t), SHAPE(t));
  Buffer out(bytes), again(bytes, 0x5a);
  CHECK(pack(t, out.data(), 3) == MS_OK);
  CHECK(pack(t, again.data(), 1) == MS_OK);
  CHECK(std::memcmp(out.data(), again.data(), static_cast<size_t>(bytes)) == 0);  // nothing left unwritten
  CHECK(out.intact());
  ms_header header;
  std::memcpy(&header, out.data(), sizeof header);
  const uint8_t zero[16] = {};
  CHECK(header.magic == MS_MAGIC && header.format == format && header.bytes == bytes);
  CHECK(header.experts == e && header.n == n && header.k == k && std::memcmp(header.zero, zero, 16) == 0);
  if (n * k < 200000) check_layout(t, out);

  // Neither side of the canonical form needs to be aligned.
  const auto size = [](const Bytes &data) { return static_cast<int64_t>(data.size()); };
  Buffer codes(size(t.codes) + 1), scales(size(t.scales) + 1, 0x3c);
  CHECK(ms_unpack(out.data(), bytes, codes.data() + 1, scales.data() + 1, 2) == MS_OK);
  CHECK_IN(std::equal(t.codes.begin(), t.codes.end(), codes.data() + 1), SHAPE(t));
  CHECK_IN(std::equal(t.scales.begin(), t.scales.end(), scales.data() + 1), SHAPE(t));
  CHECK(codes.intact() && codes.data()[0] == 0xa5);
  CHECK(scales.intact() && scales.data()[0] == 0x3c);
  CHECK(ms_pack(format, e, n, k, codes.data() + 1, scales.data() + 1, again.data(), 2) == MS_OK);
  CHECK(std::memcmp(out.data(), again.data(), static_cast<size_t>(bytes)) == 0);
}

void test_round_trip() {
  for (int format = 0; format < MS_FORMATS; ++format) {
    for (int64_t n : {1, 15, 16, 17, 33}) {
      for (int64_t k : {1, 16, 31, 32, 33, 48, 64, 96, 128, 130, 288}) {
        for (int64_t e = 1; e <= 3; ++e) check_shape(format, e, n, k);
      }
    }
    for (int64_t n : {1, 17, 144, 300}) check_shape(format, 2, n, 2880);
    for (int64_t k : {1, 33, 288}) check_shape(format, 1, 2880, k);
    check_shape(format, 0, 16, 32), check_shape(format, 1, 0, 32), check_shape(format, 2, 16, 0);
  }
  check_shape(MS_MXFP4, 1, 2880, 2880);
}

// A code lands in its own place and nowhere else.
void test_single_codes() {
  for (int format = 0; format < MS_FORMATS; ++format) {
    const int bits = kFacts[format].bits;
    for (int n = 0; n < 16; ++n) {
      for (int k = 0; k < 32; ++k) {
        Tensor t(format, 1, 16, 32);
        const int64_t bit = k * bits;
        const int all = (1 << bits) - 1;
        for (int b = 0; b < bits; ++b) {
          t.row(0, n)[(bit + b) / 8] |= static_cast<uint8_t>(1 << (bit + b) % 8);
        }
        Buffer out(packed_bytes(t));
        CHECK(pack(t, out.data(), 1) == MS_OK);
        CHECK(packed_code(out.data() + 64, bits, n, k) == all);
        int64_t ones = 0;
        for (int64_t i = 64; i < 64 + kFacts[format].tile; ++i) ones += __builtin_popcount(out.data()[i]);
        CHECK(ones == bits);
      }
    }
  }
}

void test_beyond_the_row() {
  for (int format : {MS_MXFP4, MS_NVFP4, MS_MXFP6_E2M3, MS_MXFP6_E3M2}) {
    for (int64_t k : {1, 31, 33}) {
      Tensor t(format, 2, 18, k);
      t.row(1, 17)[t.stride - 1] = 0x80;
      Buffer out(packed_bytes(t));
      CHECK(pack(t, out.data()) == MS_BAD_ARGUMENT);
      CHECK(ms_unpack(out.data(), out.bytes, t.codes.data(), t.scales.data(), 1) == MS_BAD_HEADER);
    }
  }
}

void test_lies() {
  Tensor t(MS_MXFP6_E3M2, 2, 20, 70);
  t.randomize(7);
  Buffer out(packed_bytes(t));
  CHECK(pack(t, out.data()) == MS_OK);
  const auto unpack = [&](int64_t bytes) { return ms_unpack(out.data(), bytes, t.codes.data(), t.scales.data(), 1); };
  CHECK(unpack(out.bytes) == MS_OK);
  const int64_t end = out.bytes;
  for (int64_t bytes : {INT64_MIN, int64_t{-1}, int64_t{0}, int64_t{63}, int64_t{64}, end - 1, end + 1}) {
    CHECK_IN(unpack(bytes) == MS_BAD_HEADER, "bytes %ld", long(bytes));
  }
  ms_header good;
  std::memcpy(&good, out.data(), sizeof good);
  alignas(64) uint8_t cut[32];  // only the first half can be read
  std::memcpy(cut, out.data(), sizeof cut);
  CHECK(ms_unpack(cut, sizeof cut, t.codes.data(), t.scales.data(), 1) == MS_BAD_HEADER);
  const auto lie = [&](auto change) {
    ms_header bad = good;
    change(bad);
    std::memcpy(out.data(), &bad, sizeof bad);
    return unpack(out.bytes);
  };
  CHECK(lie([](ms_header &) {}) == MS_OK);
  CHECK(lie([](ms_header &h) { h.magic ^= 1; }) == MS_BAD_HEADER);
  CHECK(lie([](ms_header &h) { h.flags |= 2; }) == MS_BAD_HEADER);
  for (int format : {-1, int(MS_FORMATS), INT32_MAX, INT32_MIN, int(MS_MXFP4)}) {
    CHECK(lie([=](ms_header &h) { h.format = format; }) == MS_BAD_HEADER);
  }
  for (int64_t size : {INT64_MIN, int64_t{-1}, int64_t{0}, int64_t{1} << 20, int64_t{1} << 40, INT64_MAX}) {
    CHECK(lie([=](ms_header &h) { h.experts = size; }) == MS_BAD_HEADER);
    CHECK(lie([=](ms_header &h) { h.n = size; }) == MS_BAD_HEADER);
    CHECK(lie([=](ms_header &h) { h.k = size; }) == MS_BAD_HEADER);
    CHECK(lie([=](ms_header &h) { h.bytes = size; }) == MS_BAD_HEADER);
    CHECK(lie([=](ms_header &h) { h.experts = h.n = h.k = size; }) == MS_BAD_HEADER);
  }
}

void test_arguments() {
  const int64_t huge = int64_t{1} << 40;
  for (int format : {-1, int(MS_FORMATS), INT32_MAX, INT32_MIN}) {
    CHECK(ms_packed_bytes(format, 1, 16, 32) == -1);
  }
  for (int format = 0; format < MS_FORMATS; ++format) {
    for (int64_t bad : {int64_t{-1}, INT64_MIN, INT64_MAX, huge + 1}) {
      CHECK(ms_packed_bytes(format, bad, 16, 32) == -1);
      CHECK(ms_packed_bytes(format, 1, bad, 32) == -1);
      CHECK(ms_packed_bytes(format, 1, 16, bad) == -1);
    }
    CHECK(ms_packed_bytes(format, huge, huge, huge) == -1);
    CHECK(ms_packed_bytes(format, 1, huge, huge) == -1);
    CHECK(ms_packed_bytes(format, huge, 1, huge) == -1);
    CHECK(ms_packed_bytes(format, huge, huge, 1) == -1);
    CHECK(ms_packed_bytes(format, 1, huge, 1) > huge);
    CHECK(ms_packed_bytes(format, 0, huge, huge) == -1);  // not even none of what cannot be
  }
  Tensor t(MS_MXFP4, 1, 16, 32);
  Buffer out(packed_bytes(t));
  uint8_t *codes = t.codes.data(), *scales = t.scales.data();
  CHECK(ms_pack(MS_FORMATS, 1, 16, 32, codes, scales, out.data(), 1) == MS_BAD_ARGUMENT);
  CHECK(ms_pack(MS_MXFP4, 1, huge, huge, codes, scales, out.data(), 1) == MS_BAD_ARGUMENT);
  CHECK(ms_pack(MS_MXFP4, -1, 16, 32, codes, scales, out.data(), 1) == MS_BAD_ARGUMENT);
  CHECK(ms_pack(MS_MXFP4, 1, 16, 32, nullptr, scales, out.data(), 1) == MS_BAD_ARGUMENT);
  CHECK(ms_pack(MS_MXFP4, 1, 16, 32, codes, nullptr, out.data(), 1) == MS_BAD_ARGUMENT);
  CHECK(ms_pack(MS_MXFP4, 1, 16, 32, codes, scales, nullptr, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_pack(MS_MXFP4, 1, 16, 32, codes, scales, out.data() + 32, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_pack(MS_MXFP4, 0, 16, 32, nullptr, nullptr, out.data(), 1) == MS_OK);
  CHECK(ms_unpack(out.data(), 64, nullptr, nullptr, 1) == MS_OK);
  CHECK(ms_pack(MS_MXFP4, 1, 16, 32, codes, scales, out.data(), -5) == MS_OK);
  CHECK(ms_unpack(out.data(), out.bytes, nullptr, scales, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_unpack(out.data(), out.bytes, codes, nullptr, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_unpack(nullptr, 64, codes, scales, 1) == MS_BAD_ARGUMENT);
  CHECK(ms_unpack(out.data() + 8, out.bytes, codes, scales, 1) == MS_BAD_ARGUMENT);
}

}  // namespace

int main() {
  test_round_trip();
  test_single_codes();
  test_beyond_the_row();
  test_lies();
  test_arguments();
  return check::finish("test_pack");
}
