// bitvla._native: NumPy arrays in and out, checked here; nothing is allocated, the GIL is free while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "ops.h"
#include "threads.h"

namespace nb = nanobind;

namespace bitvla {
namespace {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;

constexpr size_t kAny = static_cast<size_t>(-1);

std::string describe(std::vector<size_t> shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + (shape[i] == kAny ? std::string("any") : std::to_string(shape[i]));
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

template <class Given>
std::string shape_of(const Given& array) {
  std::vector<size_t> shape;
  for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(array.shape(i));
  return describe(shape);
}

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

// A macro, so that messages are put together only when they are needed.
#define REQUIRE(condition, message)    \
  do {                                 \
    if (!(condition)) refuse(message); \
  } while (false)

const char* name_of(nb::dlpack::dtype type) {
  if (type == nb::dtype<float>()) return "float32";
  if (type == nb::dtype<int8_t>()) return "int8";
  if (type == nb::dtype<uint8_t>()) return "uint8";
  if (type == nb::dtype<int32_t>()) return "int32";
  if (type == nb::dtype<uint16_t>()) return "uint16";
  return "another type";
}

// An array as a pointer and the distance of its rows; ValueError unless type, shape and order are as expected.
template <class T>
struct Array {
  T* data;
  size_t stride;
};

template <class T, class Given>
Array<T> expect(const char* name, const Given& array, std::initializer_list<size_t> expected) {
  using Value = std::remove_const_t<T>;
  const size_t* shape = expected.begin();
  const size_t dims = expected.size();
  bool fits = array.ndim() == dims;
  for (size_t i = 0; fits && i < dims; ++i) fits = shape[i] == kAny || shape[i] == array.shape(i);
  REQUIRE(fits, std::string(name) + ": shape " + shape_of(array) + ", expected " + describe(expected));
  REQUIRE(array.dtype() == nb::dtype<Value>(),
          std::string(name) + ": " + name_of(array.dtype()) + ", expected " + name_of(nb::dtype<Value>()));
  if (array.size() == 0) return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(array.data()))), 0};
  // The rows of a matrix may lie apart; everything else is without gaps.
  int64_t step = 1;
  for (size_t i = dims; i-- > 0;) {
    const bool rows = dims == 2 && i == 0;
    const bool ordered = array.shape(i) == 1 || (rows ? array.stride(i) >= step : array.stride(i) == step);
    REQUIRE(ordered, std::string(name) + ": not in C order, shape " + shape_of(array));
    step *= static_cast<int64_t>(array.shape(i));
  }
  const bool apart = dims == 2 && array.shape(0) > 1;
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(array.data()))),
          static_cast<size_t>(apart ? array.stride(0) : step)};
}

// start + count, or the largest number where that would wrap around.
size_t end_of(size_t start, size_t count) { return start > kAny - count ? kAny : start + count; }

template <class Given>
size_t rows_of(const char* name, const Given& array) {
  REQUIRE(array.ndim() == 2, std::string(name) + ": " + std::to_string(array.ndim()) + " dimensions, expected 2");
  return array.shape(0);
}

Quantized expect_quantized(const Out& codes, const Out& scales, const Out& sums, size_t tokens, size_t width) {
  const auto c = expect<int8_t>("codes", codes, {tokens, code_columns(width)});
  return {c.data, c.stride, expect<float>("scales", scales, {tokens}).data,
          expect<int32_t>("sums", sums, {tokens}).data};
}

RowJob row_job(RowOp op, const In& x) {
  rows_of("x", x);
  const auto array = expect<const float>("x", x, {kAny, kAny});
  RowJob job{};
  job.op = op;
  job.x = array.data;
  job.x_stride = array.stride;
  job.width = x.shape(1);
  return job;
}

void run(RowJob& job, size_t tokens) {
  if (tokens == 0 || job.width == 0) return;
  nb::gil_scoped_release free;
  run_rows(job, tokens);
}

void run_to_float(RowJob job, const In& x, const Out& out) {
  const auto array = expect<float>("out", out, {x.shape(0), job.width});
  job.out = array.data;
  job.out_stride = array.stride;
  run(job, x.shape(0));
}

void run_to_codes(RowJob job, const In& x, const Out& codes, const Out& scales, const Out& sums) {
  REQUIRE(job.width > 0 || x.shape(0) == 0, "x: no columns to quantise");
  job.codes = expect_quantized(codes, scales, sums, x.shape(0), job.width);
  run(job, x.shape(0));
}

RowJob rms_norm_job(const In& x, const In& weight, float eps) {
  RowJob job = row_job(RowOp::kRmsNorm, x);
  job.weight = expect<const float>("weight", weight, {job.width}).data;
  job.eps = eps;
  return job;
}

RowJob layer_norm_job(const In& x, const In& weight, const In& bias, float eps) {
  RowJob job = row_job(RowOp::kLayerNorm, x);
  job.weight = expect<const float>("weight", weight, {job.width}).data;
  job.bias = expect<const float>("bias", bias, {job.width}).data;
  job.eps = eps;
  return job;
}

RowJob relu2_job(const In& gate, const In& up, const In& weight, float eps) {
  RowJob job = row_job(RowOp::kRelu2GateNorm, gate);
  const auto other = expect<const float>("up", up, {gate.shape(0), job.width});
  job.up = other.data;
  job.up_stride = other.stride;
  job.weight = expect<const float>("weight", weight, {job.width}).data;
  job.eps = eps;
  return job;
}

Packing packing_of(const std::string& name) {
  REQUIRE(name == "2bit" || name == "base3", "packing: '" + name + "', expected 2bit or base3");
  return name == "base3" ? Packing::kBase3 : Packing::k2Bit;
}

TernaryJob ternary_job(const In& codes, const In& sums, const In& packed, size_t n, size_t k,
                       const std::string& packing) {
  const size_t tokens = rows_of("codes", codes);
  REQUIRE(k >= 1 && k <= kMaxColumns, "k: " + std::to_string(k) + ", expected 1 to " + std::to_string(kMaxColumns));
  const auto c = expect<const int8_t>("codes", codes, {tokens, code_columns(k)});
  TernaryJob job{};
  job.in.codes = const_cast<int8_t*>(c.data);
  job.in.stride = c.stride;
  job.in.sums = const_cast<int32_t*>(expect<const int32_t>("sums", sums, {tokens}).data);
  job.packing = packing_of(packing);
  job.packed = expect<const uint8_t>("packed", packed, {tiles(n), blocks(job.packing, k), kBlockBytes}).data;
  job.rows = n;
  job.cols = k;
  return job;
}

void run(const TernaryJob& job, size_t tokens) {
  if (tokens == 0 || job.rows == 0) return;
  nb::gil_scoped_release free;
  run_ternary(job, tokens);
}

void ternary_matmul(In codes, In sums, In packed, size_t n, size_t k, Out out, const std::string& packing) {
  TernaryJob job = ternary_job(codes, sums, packed, n, k, packing);
  const auto array = expect<int32_t>("out", out, {codes.shape(0), n});
  job.raw = array.data;
  job.raw_stride = array.stride;
  run(job, codes.shape(0));
}

void ternary_linear(In codes, In scales, In sums, In packed, size_t n, size_t k, float weight_scale,
                    std::optional<In> bias, Out out, bool accumulate, const std::string& packing) {
  TernaryJob job = ternary_job(codes, sums, packed, n, k, packing);
  job.in.scales = const_cast<float*>(expect<const float>("scales", scales, {codes.shape(0)}).data);
  job.weight_scale = weight_scale;
  if (bias) job.bias = expect<const float>("bias", *bias, {n}).data;
  job.accumulate = accumulate;
  const auto array = expect<float>("out", out, {codes.shape(0), n});
  job.out = array.data;
  job.out_stride = array.stride;
  run(job, codes.shape(0));
}

void linear(In x, In weight, std::optional<In> bias, Out out, bool accumulate, std::optional<In> row_scales) {
  const size_t tokens = rows_of("x", x);
  rows_of("weight", weight);
  LinearJob job{};
  const auto in = expect<const float>("x", x, {tokens, kAny});
  job.x = in.data;
  job.x_stride = in.stride;
  job.rows = weight.shape(0);
  job.cols = x.shape(1);
  REQUIRE(row_scales.has_value() == (weight.dtype() == nb::dtype<int8_t>()),
          "row_scales: they belong to int8 weights, and those need them");
  if (row_scales) {
    const auto w = expect<const int8_t>("weight", weight, {kAny, job.cols});
    REQUIRE(w.stride == job.cols || job.rows <= 1, "weight: rows lie apart, expected C order");
    job.weight_int8 = w.data;
    job.row_scales = expect<const float>("row_scales", *row_scales, {job.rows}).data;
  } else if (weight.dtype() == nb::dtype<uint16_t>()) {
    const auto w = expect<const uint16_t>("weight", weight, {kAny, job.cols});
    REQUIRE(w.stride == job.cols || job.rows <= 1, "weight: rows lie apart, expected C order");
    job.weight_bf16 = w.data;
  } else {
    const auto w = expect<const float>("weight", weight, {kAny, job.cols});
    REQUIRE(w.stride == job.cols || job.rows <= 1 || job.cols == 0, "weight: rows lie apart, expected C order");
    job.weight = w.data;
  }
  if (bias) job.bias = expect<const float>("bias", *bias, {job.rows}).data;
  job.accumulate = accumulate;
  const auto array = expect<float>("out", out, {tokens, job.rows});
  job.out = array.data;
  job.out_stride = array.stride;
  if (tokens == 0 || job.rows == 0) return;
  nb::gil_scoped_release free;
  run_linear(job, tokens);
}

// Packed keys and values: [kv_heads * tiles][dim * 16] and [kv_heads * places][padded(dim)].
template <class T, class Given>
void expect_packed(AttentionJob& job, const char* k_name, const Given& k, const char* v_name, const Given& v,
                   size_t keys) {
  const size_t room = std::min(rows_of(k_name, k) / job.kv_heads * kTile, rows_of(v_name, v) / job.kv_heads);
  REQUIRE(room >= keys, std::string(k_name) + ", " + v_name + ": room for " + std::to_string(room) +
                            " packed keys, expected at least " + std::to_string(keys));
  const auto ka = expect<T>(k_name, k, {k.shape(0) / job.kv_heads * job.kv_heads, job.dim * kTile});
  const auto va = expect<T>(v_name, v, {v.shape(0) / job.kv_heads * job.kv_heads, padded(job.dim)});
  REQUIRE(ka.stride == job.dim * kTile && va.stride == padded(job.dim),
          std::string(k_name) + ", " + v_name + ": rows lie apart, expected C order");
  job.packed_k = const_cast<float*>(ka.data);
  job.packed_v = const_cast<float*>(va.data);
  job.packed_k_stride = k.shape(0) / job.kv_heads * ka.stride;
  job.packed_v_stride = v.shape(0) / job.kv_heads * va.stride;
}

void attention(In q, In k, In v, size_t heads, size_t kv_heads, float scale, bool causal, Out out,
               std::optional<size_t> packed) {
  AttentionJob job{};
  job.queries = rows_of("q", q);
  job.keys = packed ? *packed : rows_of("k", k);
  REQUIRE(heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
          "heads: " + std::to_string(heads) + ", expected a multiple of kv_heads = " + std::to_string(kv_heads));
  job.heads = heads;
  job.kv_heads = kv_heads;
  job.dim = q.shape(1) / heads;
  REQUIRE(q.shape(1) == heads * job.dim && job.dim > 0 && job.dim <= kMaxHeadDim,
          "q: shape " + describe({job.queries, q.shape(1)}) + ", expected heads = " + std::to_string(heads) +
              " times 1 to " + std::to_string(kMaxHeadDim) + " columns");
  const auto qa = expect<const float>("q", q, {job.queries, heads * job.dim});
  const auto oa = expect<float>("out", out, {job.queries, heads * job.dim});
  if (packed) {
    expect_packed<const float>(job, "k", k, "v", v, job.keys);
  } else {
    const auto ka = expect<const float>("k", k, {kAny, kv_heads * job.dim});
    const auto va = expect<const float>("v", v, {job.keys, kv_heads * job.dim});
    job.k = ka.data;
    job.v = va.data;
    job.k_stride = ka.stride;
    job.v_stride = va.stride;
  }
  if (job.queries == 0) return;
  REQUIRE(job.keys > 0, "k: no keys");
  REQUIRE(!causal || job.keys >= job.queries, "k: " + std::to_string(job.keys) + " keys, expected at least the " +
                                                  std::to_string(job.queries) + " queries of a causal mask");
  job.q = qa.data;
  job.out = oa.data;
  job.q_stride = qa.stride;
  job.out_stride = oa.stride;
  job.scale = scale;
  job.causal = causal;
  nb::gil_scoped_release free;
  run_attention(job);
}

void append(In k, In v, size_t start, size_t kv_heads, Out packed_k, Out packed_v) {
  AttentionJob job{};
  job.keys = rows_of("k", k);
  REQUIRE(kv_heads > 0 && k.shape(1) % kv_heads == 0,
          "kv_heads: " + std::to_string(kv_heads) + ", expected a divisor of " + std::to_string(k.shape(1)));
  job.kv_heads = kv_heads;
  job.dim = k.shape(1) / kv_heads;
  const auto ka = expect<const float>("k", k, {job.keys, kv_heads * job.dim});
  const auto va = expect<const float>("v", v, {job.keys, kv_heads * job.dim});
  expect_packed<float>(job, "packed_k", packed_k, "packed_v", packed_v, end_of(start, job.keys));
  job.k = ka.data;
  job.v = va.data;
  job.k_stride = ka.stride;
  job.v_stride = va.stride;
  nb::gil_scoped_release free;
  run_append(job, start);
}

void rope(Out x, In cos, In sin, size_t start, size_t heads) {
  const size_t tokens = rows_of("x", x), positions = rows_of("cos", cos), end = end_of(start, tokens);
  REQUIRE(heads <= x.shape(1), "heads: " + std::to_string(heads) + ", expected at most the columns of x, " +
                                   std::to_string(x.shape(1)));
  RopeJob job{};
  job.heads = heads;
  job.dim = 2 * cos.shape(1);
  job.start = start;
  const auto array = expect<float>("x", x, {tokens, heads * job.dim});
  job.x = array.data;
  job.x_stride = array.stride;
  job.cos = expect<const float>("cos", cos, {positions, job.dim / 2}).data;
  job.sin = expect<const float>("sin", sin, {positions, job.dim / 2}).data;
  REQUIRE(end <= positions,
          "cos: " + std::to_string(positions) + " positions, expected at least " + std::to_string(end));
  if (tokens == 0) return;
  nb::gil_scoped_release free;
  run_rope(job, tokens);
}

void set_isa(const std::string& name) {
  const Kernels* kernels = find_kernels(name.c_str());
  std::string known;
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    known += (known.empty() ? "" : ", ") + std::string((*k)->name);
  }
  REQUIRE(kernels, "name: '" + name + "' is unknown or not supported here, expected one of " + known);
  set_active(*kernels);
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Kernels* const* k = available_kernels(); *k; ++k) names.push_back((*k)->name);
  return names;
}

void check_threads(int threads) {
  REQUIRE(threads >= 1 && threads <= 1024, "threads: " + std::to_string(threads) + ", expected 1 to 1024");
}

}  // namespace
}  // namespace bitvla

NB_MODULE(_native, m) {
  using namespace bitvla;
  using namespace nb::literals;
  active();  // refuse a wrong BITVLA_ISA at import

  m.def("isa", [] { return std::string(active().name); });
  m.def("available", available);
  m.def("set_isa", set_isa, "name"_a);
  m.def("num_threads", num_threads);
  m.def("set_num_threads", [](int n) { check_threads(n); set_num_threads(n); }, "n"_a);

  m.def("quantize", [](In x, Out codes, Out scales, Out sums) {
    run_to_codes(row_job(RowOp::kCopy, x), x, codes, scales, sums);
  }, "x"_a, "codes"_a, "scales"_a, "sums"_a);
  m.def("rms_norm", [](In x, In weight, float eps, Out out) {
    run_to_float(rms_norm_job(x, weight, eps), x, out);
  }, "x"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("rms_norm_quantize", [](In x, In weight, float eps, Out codes, Out scales, Out sums) {
    run_to_codes(rms_norm_job(x, weight, eps), x, codes, scales, sums);
  }, "x"_a, "weight"_a, "eps"_a, "codes"_a, "scales"_a, "sums"_a);
  m.def("layer_norm", [](In x, In weight, In bias, float eps, Out out) {
    run_to_float(layer_norm_job(x, weight, bias, eps), x, out);
  }, "x"_a, "weight"_a, "bias"_a, "eps"_a, "out"_a);
  m.def("layer_norm_quantize", [](In x, In weight, In bias, float eps, Out codes, Out scales, Out sums) {
    run_to_codes(layer_norm_job(x, weight, bias, eps), x, codes, scales, sums);
  }, "x"_a, "weight"_a, "bias"_a, "eps"_a, "codes"_a, "scales"_a, "sums"_a);
  m.def("relu2_gate_norm_quantize", [](In gate, In up, In weight, float eps, Out codes, Out scales, Out sums) {
    run_to_codes(relu2_job(gate, up, weight, eps), gate, codes, scales, sums);
  }, "gate"_a, "up"_a, "weight"_a, "eps"_a, "codes"_a, "scales"_a, "sums"_a);
  m.def("gelu_quantize", [](In x, bool approximate, Out codes, Out scales, Out sums) {
    run_to_codes(row_job(approximate ? RowOp::kGeluTanh : RowOp::kGeluErf, x), x, codes, scales, sums);
  }, "x"_a, "approximate"_a, "codes"_a, "scales"_a, "sums"_a);
  m.def("gelu", [](In x, bool approximate, Out out) {
    run_to_float(row_job(approximate ? RowOp::kGeluTanh : RowOp::kGeluErf, x), x, out);
  }, "x"_a, "approximate"_a, "out"_a);
  m.def("relu", [](In x, Out out) { run_to_float(row_job(RowOp::kRelu, x), x, out); }, "x"_a, "out"_a);

  m.def("ternary_matmul", ternary_matmul, "codes"_a, "sums"_a, "packed"_a, "n"_a, "k"_a, "out"_a,
        "packing"_a = "2bit");
  m.def("ternary_linear", ternary_linear, "codes"_a, "scales"_a, "sums"_a, "packed"_a, "n"_a, "k"_a, "weight_scale"_a,
        "bias"_a.none(), "out"_a, "accumulate"_a = false, "packing"_a = "2bit");
  m.def("linear", linear, "x"_a, "weight"_a, "bias"_a.none(), "out"_a, "accumulate"_a = false,
        "row_scales"_a = nb::none());
  m.def("attention", attention, "q"_a, "k"_a, "v"_a, "heads"_a, "kv_heads"_a, "scale"_a, "causal"_a, "out"_a,
        nb::kw_only(), "packed"_a = nb::none());
  m.def("append", append, "k"_a, "v"_a, "start"_a, "kv_heads"_a, "packed_k"_a, "packed_v"_a);
  m.def("rope", rope, "x"_a, "cos"_a, "sin"_a, "start"_a, "heads"_a);

  m.def("peak_int8_gmacs", [](double seconds, int threads) {
    check_threads(threads);
    nb::gil_scoped_release free;
    return peak_int8_gmacs(seconds, threads);
  }, "seconds"_a, "threads"_a);
  m.def("peak_bandwidth_gbs", [](double seconds, size_t megabytes, int threads) {
    check_threads(threads);
    nb::gil_scoped_release free;
    return peak_bandwidth_gbs(seconds, megabytes, threads);
  }, "seconds"_a, "megabytes"_a, "threads"_a);
}
