// Python's view of the C ABI: addresses and sizes as integers, a status as an exception. Arguments are checked in
// Python (backends/cpu.py); what arrives here is only held against the packed buffer's own header.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>
#include <new>
#include <string>

#include "microscale.h"

namespace nb = nanobind;

namespace {

using Address = std::uintptr_t;  // of a tensor's data, 0 for NULL

template <typename T>
T *at(Address address) {
  return reinterpret_cast<T *>(address);  // NOLINT(performance-no-int-to-ptr)
}

void check(int status, const char *what) {
  switch (status) {
    case MS_OK: return;
    case MS_NO_MEMORY: throw std::bad_alloc();
    case MS_BAD_HEADER:
      throw nb::value_error((std::string(what) + ": the buffer does not hold a tensor that this core packed").c_str());
    case MS_BAD_LEVEL:
      throw nb::value_error((std::string(what) + ": this processor, or this build, does not have that level").c_str());
    default: throw nb::value_error((std::string(what) + ": an argument is out of range").c_str());
  }
}

int64_t packed_bytes(int format, int64_t experts, int64_t n, int64_t k) {
  const int64_t bytes = ms_packed_bytes(format, experts, n, k);
  if (bytes < 0) throw nb::value_error("packed_bytes: no such format, or a size that cannot be");
  return bytes;
}

void pack(int format, int64_t experts, int64_t n, int64_t k, Address codes, Address scales, Address packed,
          int threads) {
  int status;
  {
    nb::gil_scoped_release release;
    status =
        ms_pack(format, experts, n, k, at<const uint8_t>(codes), at<const void>(scales), at<void>(packed), threads);
  }
  check(status, "pack");
}

void unpack(Address packed, int64_t bytes, Address codes, Address scales, int threads) {
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_unpack(at<const void>(packed), bytes, at<uint8_t>(codes), at<void>(scales), threads);
  }
  check(status, "unpack");
}

void linear(int level, Address w, Address outer, int dtype, Address x, int64_t x_stride, int64_t m, Address bias,
            Address y, int threads) {
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_linear(level, at<const void>(w), at<const float>(outer), dtype, at<const void>(x), x_stride, m,
                       at<const float>(bias), at<void>(y), threads);
  }
  check(status, "linear");
}

void dense(int level, int weight_dtype, Address w, int64_t w_stride, int64_t n, int64_t k, Address bias, int dtype,
           Address x, int64_t x_stride, int64_t m, Address y, int threads) {
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_dense(level, weight_dtype, at<const void>(w), w_stride, n, k, at<const void>(bias), dtype,
                      at<const void>(x), x_stride, m, at<void>(y), threads);
  }
  check(status, "dense");
}

void moe(int level, Address w13, Address outer13, Address w2, Address outer2, int dtype, Address x, int64_t m,
         Address ids, Address weights, int64_t t, int kind, bool gated, bool interleaved, float alpha, float beta,
         float limit, Address b13, Address b2, bool weight_on_input, Address y, int threads) {
  const ms_activation activation{kind, gated, interleaved, alpha, beta, limit};
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_moe(level, at<const void>(w13), at<const float>(outer13), at<const void>(w2), at<const float>(outer2),
                    dtype, at<const void>(x), m, at<const int64_t>(ids), at<const float>(weights), t, &activation,
                    at<const float>(b13), at<const float>(b2), weight_on_input, at<void>(y), threads);
  }
  check(status, "moe");
}

void rms_norm(int level, int dtype, Address x, int64_t m, int64_t n, int weight_dtype, Address w, float epsilon,
              Address y) {
  check(ms_rms_norm(level, dtype, at<const void>(x), m, n, weight_dtype, at<const void>(w), epsilon, at<void>(y)),
        "rms_norm");
}

// Shapes: (batch, heads, key_heads, queries, tokens, width, value_width); strides: of q, k, v, three each, and the
// mask's.
void attend(int level, int dtype, float scale, std::array<int64_t, 7> shape, Address q, Address k, Address v,
            std::array<int64_t, 11> strides, Address mask, Address sinks, Address y, int threads) {
  ms_attention a{};
  a.dtype = dtype, a.scale = scale;
  a.batch = shape[0], a.heads = shape[1], a.key_heads = shape[2], a.queries = shape[3], a.tokens = shape[4];
  a.width = shape[5], a.value_width = shape[6];
  a.q = at<const void>(q), a.k = at<const void>(k), a.v = at<const void>(v);
  for (size_t i = 0; i < 3; ++i)
    a.q_strides[i] = strides[i], a.k_strides[i] = strides[3 + i], a.v_strides[i] = strides[6 + i];
  a.mask_strides[0] = strides[9], a.mask_strides[1] = strides[10];
  a.mask = at<const uint8_t>(mask), a.sinks = at<const void>(sinks), a.y = at<void>(y);
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_attend(level, &a, threads);
  }
  check(status, "attend");
}

double read_rate(Address from, int64_t bytes, int threads) {
  double rate = 0;
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_read_rate(at<const void>(from), bytes, threads, &rate);
  }
  check(status, "read_rate");
  return rate;
}

double multiply_rate(int level, int threads) {
  double rate = 0;
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_multiply_rate(level, threads, &rate);
  }
  check(status, "multiply_rate");
  return rate;
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "microscale's C++ core; see csrc/microscale.h. Everything is positional.";
  m.def("packed_bytes", &packed_bytes);
  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("linear", &linear);
  m.def("dense", &dense);
  m.def("moe", &moe);
  m.def("rms_norm", &rms_norm);
  m.def("attend", &attend);
  m.def("level", &ms_level);
  m.def("compiled_level", &ms_compiled_level);
  m.def("read_rate", &read_rate);
  m.def("multiply_rate", &multiply_rate);
}
