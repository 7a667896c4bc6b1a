// Python's view of the C ABI: addresses and sizes as integers, a status as an exception. Arguments are checked in
// Python (backends/cpu.py); what arrives here is only held against the packed buffer's own header.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <limits>
#include <new>
#include <string>
#include <vector>

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

void linear(int level, Address w, Address outer, int dtype, Address x, int64_t x_stride, Address x_outer, int64_t m,
            Address bias, Address y, int threads) {
  int status;
  {
    nb::gil_scoped_release release;
    status = ms_linear(level, at<const void>(w), at<const float>(outer), dtype, at<const void>(x), x_stride,
                       at<const float>(x_outer), m, at<const float>(bias), at<void>(y), threads);
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

void moe(int level, Address w13, Address outer13, Address w2, Address outer2, int dtype, Address x, Address x_outer,
         int64_t m, Address ids, Address weights, int64_t t, int kind, bool gated, bool interleaved, float alpha,
         float beta, float limit, int stored, Address b13, Address b2, bool weight_on_input, Address y, int threads) {
  const ms_activation activation{kind, gated, interleaved, alpha, beta, limit, stored};
  int status;
  {
    nb::gil_scoped_release release;
    status =
        ms_moe(level, at<const void>(w13), at<const float>(outer13), at<const void>(w2), at<const float>(outer2), dtype,
               at<const void>(x), at<const float>(x_outer), m, at<const int64_t>(ids), at<const float>(weights), t,
               &activation, at<const float>(b13), at<const float>(b2), weight_on_input, at<void>(y), threads);
  }
  check(status, "moe");
}

void stored(int level, int format, int dtype, Address x, int64_t x_stride, int64_t m, int64_t k, int to, Address y,
            Address outer, int threads) {
  int status;
  {
    nb::gil_scoped_release release;
    status =
        ms_stored(level, format, dtype, at<const void>(x), x_stride, m, k, to, at<void>(y), at<float>(outer), threads);
  }
  check(status, "stored");
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

void route(int level, int dtype, Address logits, int64_t m, int64_t experts, int router, bool renormalize, int rounded,
           int64_t chosen, Address ids, Address weights) {
  check(ms_route(level, dtype, at<const void>(logits), m, experts, router, renormalize, rounded, chosen,
                 at<int64_t>(ids), at<float>(weights)),
        "route");
}

// Steps of ms_token, put down once and run for every token. The caller keeps what the addresses are of.
class Chain {
 public:
  Chain(int dtype, int64_t m) : dtype_(dtype), m_(m) {}

  void embed(Address table, int64_t count, int64_t n, Address ids, Address y) {
    auto &s = add(MS_STEP_EMBED).of.embed;
    s.table = at<const void>(table), s.count = count, s.n = n, s.ids = at<const int64_t>(ids), s.y = at<void>(y);
  }
  void norm(Address x, Address more, int weight_dtype, Address w, int64_t n, float epsilon, bool twice, Address y) {
    auto &s = add(MS_STEP_NORM).of.norm;
    s.x = at<void>(x), s.more = at<const void>(more), s.weight_dtype = weight_dtype, s.twice = twice;
    s.w = at<const void>(w), s.n = n, s.epsilon = epsilon, s.y = at<void>(y);
  }
  // Of each weight: address, stride, N, the bias' address.
  void dense(int weight_dtype, int64_t k, const std::vector<std::array<int64_t, 4>> &weights, Address x, Address y) {
    if (weights.size() > MS_STEP_PARTS) throw nb::value_error("dense: too many weights side by side");
    auto &s = add(MS_STEP_DENSE).of.dense;
    s.weight_dtype = weight_dtype, s.parts = static_cast<int32_t>(weights.size()), s.k = k;
    for (size_t i = 0; i < weights.size(); ++i) {
      s.w[i] = at<const void>(static_cast<Address>(weights[i][0])), s.w_stride[i] = weights[i][1];
      s.n[i] = weights[i][2], s.bias[i] = at<const void>(static_cast<Address>(weights[i][3]));
    }
    s.x = at<const void>(x), s.y = at<void>(y);
  }
  void linear(Address w, Address outer, Address bias, int64_t k, Address x, Address y) {
    auto &s = add(MS_STEP_LINEAR).of.linear;
    s.w = at<const void>(w), s.outer = at<const float>(outer), s.bias = at<const float>(bias), s.k = k;
    s.x = at<const void>(x), s.y = at<void>(y);
  }
  // Shape: (heads, key_heads, width, turned, slots, positions); strides and addresses: of q, k and v; norms: of q
  // and k, then the dtype and whether they round twice.
  void attend(std::array<int64_t, 6> shape, std::array<Address, 3> qkv, std::array<int64_t, 3> strides,
              std::array<Address, 2> norms, int weight_dtype, bool twice, float epsilon, float scale, Address cos,
              Address sin, Address keys, Address values, Address sinks, Address y) {
    auto &s = add(MS_STEP_ATTEND).of.attend;
    s.heads = shape[0], s.key_heads = shape[1], s.width = shape[2], s.turned = shape[3], s.slots = shape[4];
    s.positions = shape[5];
    s.q = at<const void>(qkv[0]), s.k = at<const void>(qkv[1]), s.v = at<const void>(qkv[2]);
    s.q_stride = strides[0], s.k_stride = strides[1], s.v_stride = strides[2];
    s.q_norm = at<const void>(norms[0]), s.k_norm = at<const void>(norms[1]);
    s.weight_dtype = weight_dtype, s.twice = twice, s.epsilon = epsilon, s.scale = scale;
    s.cos = at<const void>(cos), s.sin = at<const void>(sin), s.keys = at<void>(keys), s.values = at<void>(values);
    s.sinks = at<const void>(sinks), s.y = at<void>(y);
  }
  void gate(int kind, int64_t n, int64_t stride, Address gate, Address up, Address y) {
    auto &s = add(MS_STEP_GATE).of.gate;
    s.activation.kind = kind, s.activation.limit = std::numeric_limits<float>::infinity();
    s.n = n, s.stride = stride, s.gate = at<const void>(gate), s.up = at<const void>(up), s.y = at<void>(y);
  }
  void route(Address logits, int64_t experts, int router, bool renormalize, int rounded, int64_t chosen, Address ids,
             Address weights) {
    auto &s = add(MS_STEP_ROUTE).of.route;
    s.logits = at<const void>(logits), s.experts = experts, s.chosen = chosen, s.router = router;
    s.renormalize = renormalize, s.rounded = rounded, s.ids = at<int64_t>(ids), s.weights = at<float>(weights);
  }
  void moe(Address w13, Address outer13, Address w2, Address outer2, Address x, Address ids, Address weights,
           int64_t chosen, int kind, bool gated, bool interleaved, float alpha, float beta, float limit, Address b13,
           Address b2, Address y) {
    auto &s = add(MS_STEP_MOE).of.moe;
    s.w13 = at<const void>(w13), s.outer13 = at<const float>(outer13);
    s.w2 = at<const void>(w2), s.outer2 = at<const float>(outer2);
    s.x = at<const void>(x), s.ids = at<const int64_t>(ids), s.weights = at<const float>(weights), s.chosen = chosen;
    s.activation = {kind, gated, interleaved, alpha, beta, limit, 0};
    s.b13 = at<const float>(b13), s.b2 = at<const float>(b2), s.y = at<void>(y);
  }

  // Returns the seconds that each kind of step took.
  std::array<double, MS_STEP_KINDS> run(int level, int64_t position, int threads) const {
    std::array<double, MS_STEP_KINDS> seconds{};
    int status;
    {
      nb::gil_scoped_release release;
      status = ms_token(level, dtype_, m_, steps_.data(), static_cast<int64_t>(steps_.size()), position, threads,
                        seconds.data());
    }
    check(status, "token");
    return seconds;
  }

 private:
  ms_step &add(int kind) {
    ms_step step{};
    step.kind = kind;
    steps_.push_back(step);
    return steps_.back();
  }

  int dtype_;
  int64_t m_;
  std::vector<ms_step> steps_;
};

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
  m.def("stored", &stored);
  m.def("rms_norm", &rms_norm);
  m.def("attend", &attend);
  m.def("route", &route);
  nb::class_<Chain>(m, "Chain")
      .def(nb::init<int, int64_t>())
      .def("embed", &Chain::embed)
      .def("norm", &Chain::norm)
      .def("dense", &Chain::dense)
      .def("linear", &Chain::linear)
      .def("attend", &Chain::attend)
      .def("gate", &Chain::gate)
      .def("route", &Chain::route)
      .def("moe", &Chain::moe)
      .def("run", &Chain::run);
  m.def("level", &ms_level);
  m.def("compiled_level", &ms_compiled_level);
  m.def("read_rate", &read_rate);
  m.def("multiply_rate", &multiply_rate);
}
