// Every instruction set of this processor against the scalar reference, bit for bit.
//
// Usage: check_kernels [--require NAME]   exits 1 if a case failed, 3 if the set NAME did not run here.
// All inputs and outputs end at an unreadable page: reading or writing one byte too far ends the program.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ops.h"
#include "threads.h"

using namespace bitvla;

namespace {

int passed = 0, failed = 0;
std::mt19937 rng(1);

size_t pick(size_t low, size_t high) { return low + rng() % (high - low + 1); }

// count values that end at a page which cannot be touched.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = (count * sizeof(T) + page - 1) / page * page;
    size_ = bytes + page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + bytes, page, PROT_NONE)) std::abort();
    data_ = reinterpret_cast<T*>(base_ + bytes - count * sizeof(T));
  }
  Guarded(const Guarded& other) : Guarded(other.count_) { std::copy_n(other.data_, count_, data_); }
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_[i]; }
  bool operator==(const Guarded& other) const {
    return count_ == other.count_ && !std::memcmp(data_, other.data_, count_ * sizeof(T));
  }

 private:
  char* base_;
  size_t size_, count_;
  T* data_;
};

Guarded<float> random_floats(size_t count, float size = 1.0f) {
  std::normal_distribution<float> normal(0, size);
  Guarded<float> x(count);
  for (size_t i = 0; i < count; ++i) x[i] = normal(rng);
  return x;
}

void report(bool same, const Kernels& kernels, const std::string& what) {
  if (same) {
    ++passed;
    return;
  }
  if (++failed <= 20) std::printf("FAILED %s: %s\n", kernels.name, what.c_str());
}

std::vector<const Kernels*> others() {
  std::vector<const Kernels*> list;
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    if (*k != &kScalar) list.push_back(*k);
  }
  return list;
}

// ---- ternary product -----------------------------------------------------------------------------------------------

enum class Fill { kRandom, kLowest, kHighest, kAlternating };

constexpr std::array kPackings = {Packing::k2Bit, Packing::kBase3};

struct TernaryCase {
  size_t m, n, k;
  Guarded<int8_t> codes;
  Guarded<float> scales;
  Guarded<int32_t> sums;
  std::array<Guarded<uint8_t>, 2> packed;  // the same weights in each packing
  Guarded<float> bias;

  TernaryCase(size_t m, size_t n, size_t k, Fill fill)
      : m(m), n(n), k(k), codes(m * code_columns(k)), scales(random_floats(m)), sums(m),
        packed{Guarded<uint8_t>(tiles(n) * blocks(Packing::k2Bit, k) * kBlockBytes),
               Guarded<uint8_t>(tiles(n) * blocks(Packing::kBase3, k) * kBlockBytes)},
        bias(random_floats(n)) {
    for (size_t i = 0; i < m; ++i) {
      sums[i] = 0;
      for (size_t j = 0; j < code_columns(k); ++j) {
        int code = static_cast<int>(rng() % 256) - 128;  // all 256 codes
        if (fill == Fill::kLowest) code = -128;
        if (fill == Fill::kHighest) code = 127;
        if (fill == Fill::kAlternating) code = (i + j) % 2 ? -128 : 127;
        codes[i * code_columns(k) + j] = static_cast<int8_t>(j < k ? code : 0);
        sums[i] += codes[i * code_columns(k) + j];
      }
    }
    set_all_zero();
    for (size_t row = 0; row < n; ++row) {
      for (size_t col = 0; col < k; ++col) {
        int weight = static_cast<int>(rng() % 3) - 1;
        if (fill == Fill::kLowest) weight = 1;
        if (fill == Fill::kHighest) weight = -1;
        if (fill == Fill::kAlternating) weight = (row + col) % 2 ? 1 : -1;
        set_weight(row, col, weight);
      }
    }
  }

  void set_all_zero() {
    std::memset(packed[0].data(), 0x55, packed[0].size());
    std::memset(packed[1].data(), (121 * 256 + 242) / 243, packed[1].size());  // 121 is 11111 in base 3
  }

  void set_weight(size_t row, size_t col, int weight) {
    uint8_t& fields = packed[0][(row / 16 * ((k + 15) / 16) + col / 16) * kBlockBytes + row % 16 * 4 + col % 4];
    const int shift = static_cast<int>(col % 16 / 4 * 2);
    fields = static_cast<uint8_t>((fields & ~(3 << shift)) | (weight + 1) << shift);
    uint8_t& digits = packed[1][(row / 16 * ((k + 19) / 20) + col / 20) * kBlockBytes + row % 16 * 4 + col % 4];
    constexpr int kPlaces[] = {81, 27, 9, 3, 1};
    const int place = kPlaces[col % 20 / 4], value = digits * 243 / 256;
    digits = static_cast<uint8_t>(((value + (weight + 1 - value / place % 3) * place) * 256 + 242) / 243);
  }

  TernaryJob job(Packing packing) const {
    TernaryJob job{};
    job.in = {codes.data(), code_columns(k), scales.data(), sums.data()};
    job.packing = packing;
    job.packed = packed[packing == Packing::kBase3].data();
    job.rows = n;
    job.cols = k;
    job.weight_scale = 0.37f;
    return job;
  }

  Guarded<int32_t> raw(const Kernels& kernels, Packing packing) const {
    Guarded<int32_t> out(m * n);
    TernaryJob j = job(packing);
    j.raw = out.data();
    j.raw_stride = n;
    set_active(kernels);
    run_ternary(j, m);
    return out;
  }

  Guarded<float> scaled(const Kernels& kernels, Packing packing, bool with_bias, bool accumulate) const {
    const size_t stride = n + 3;
    Guarded<float> out((m - 1) * stride + n);
    for (size_t i = 0; i < out.size(); ++i) out[i] = 0.125f * static_cast<float>(i % 7);
    TernaryJob j = job(packing);
    j.out = out.data();
    j.out_stride = stride;
    j.bias = with_bias ? bias.data() : nullptr;
    j.accumulate = accumulate;
    set_active(kernels);
    run_ternary(j, m);
    return out;
  }
};

void check_ternary(size_t m, size_t n, size_t k, Fill fill) {
  const TernaryCase c(m, n, k, fill);
  const std::string what = "ternary " + std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k);
  const auto raw = c.raw(kScalar, Packing::k2Bit);
  const bool with_bias = rng() % 2, accumulate = rng() % 2;
  const auto scaled = c.scaled(kScalar, Packing::k2Bit, with_bias, accumulate);
  report(raw == c.raw(kScalar, Packing::kBase3), kScalar, what + " base 3");
  for (const Kernels* kernels : others()) {
    for (Packing packing : kPackings) {
      const std::string which = what + (packing == Packing::kBase3 ? " base 3" : "");
      report(raw == c.raw(*kernels, packing), *kernels, which + " sums");
      report(scaled == c.scaled(*kernels, packing, with_bias, accumulate), *kernels, which + " scaled");
    }
  }
}

void check_ternary_all() {
  for (size_t k = 1; k <= 640; ++k) {  // few tokens and many take different ways
    check_ternary(pick(1, 9), pick(1, 40), k, Fill::kRandom);
    check_ternary(pick(25, 36), pick(1, 80), k, Fill::kRandom);
  }
  for (size_t k : {1, 15, 16, 17, 19, 20, 21, 80, 255, 256, 257, 511, 512, 513, 1152, 4304, 6912, 40000}) {
    for (Fill fill : {Fill::kLowest, Fill::kHighest, Fill::kAlternating}) {
      check_ternary(1, 17, k, fill);
      check_ternary(7, 65, k, fill);
      check_ternary(29, 65, k, fill);
    }
  }
  check_ternary(1, 3, kMaxColumns, Fill::kLowest);
  check_ternary(2, 3, kMaxColumns, Fill::kHighest);
  for (size_t size : {1, 3, 1152, 4304, 6912}) {
    check_ternary(1, 1, size, Fill::kRandom);
    check_ternary(1, size, 1, Fill::kRandom);
    check_ternary(6, size, 3, Fill::kRandom);
    check_ternary(size, 1, 1, Fill::kRandom);
    check_ternary(size, 3, 17, Fill::kRandom);
    check_ternary(3, 16, size, Fill::kRandom);
    check_ternary(31, 70, size, Fill::kRandom);
  }
  for (int i = 0; i < 600; ++i) check_ternary(pick(1, 40), pick(1, 150), pick(1, 300), Fill::kRandom);
  for (int i = 0; i < 60; ++i) check_ternary(pick(1, 90), pick(1, 200), pick(300, 1200), Fill::kRandom);

  // One weight at a time, in every place of a block: a lane that is lost or moved shows.
  for (size_t col = 0; col < 40; ++col) {
    TernaryCase c(pick(1, 30), 16, 40, Fill::kRandom);
    c.set_all_zero();
    for (size_t row = 0; row < 16; ++row) c.set_weight(row, col, row % 2 ? 1 : -1);
    const auto raw = c.raw(kScalar, Packing::k2Bit);
    for (const Kernels* kernels : others()) {
      for (Packing packing : kPackings) report(raw == c.raw(*kernels, packing), *kernels, "ternary one weight");
    }
  }
}

void check_threads() {
  const std::array<size_t, 3> shapes[] = {{1, 3000, 1152}, {3, 1000, 1600}, {70, 600, 300}, {600, 40, 200}};
  for (const auto& [m, n, k] : shapes) {
    const TernaryCase c(m, n, k, Fill::kRandom);
    for (const Kernels* const* kernels = available_kernels(); *kernels; ++kernels) {
      set_num_threads(1);
      const auto one = c.scaled(**kernels, Packing::k2Bit, true, true);
      for (int threads : {2, 7}) {
        set_num_threads(threads);
        for (Packing packing : kPackings) {
          report(one == c.scaled(**kernels, packing, true, true), **kernels, std::to_string(threads) + " threads");
        }
      }
    }
  }
}

// ---- float kernels -------------------------------------------------------------------------------------------------

struct RowResult {
  Guarded<float> out;
  Guarded<int8_t> codes;
  Guarded<float> scales;
  Guarded<int32_t> sums;
  bool operator==(const RowResult&) const = default;
};

void check_rows(RowOp op, size_t m, size_t k, float size, bool special) {
  const auto x = random_floats(m * k, size), up = random_floats(m * k);
  const auto weight = random_floats(k), bias = random_floats(k);
  if (special) {
    constexpr float kValues[] = {0.0f, -0.0f, 1e-30f, -1e30f, 3e38f, 0.5f, -100.0f, INFINITY, -INFINITY, NAN};
    for (size_t i = 0; i < m * k; i += 1 + rng() % 5) x[i] = kValues[rng() % std::size(kValues)];
  }
  const auto run = [&](const Kernels& kernels) {
    RowResult r{Guarded<float>(m * k), Guarded<int8_t>(m * code_columns(k)), Guarded<float>(m), Guarded<int32_t>(m)};
    RowJob job{};
    job.op = op;
    job.x = x.data();
    job.up = up.data();
    job.x_stride = job.up_stride = job.out_stride = k;
    job.weight = weight.data();
    job.bias = bias.data();
    job.eps = 1e-5f;
    job.width = k;
    job.codes = {r.codes.data(), code_columns(k), r.scales.data(), r.sums.data()};
    set_active(kernels);
    run_rows(job, m);
    job.out = r.out.data();
    if (op != RowOp::kCopy) run_rows(job, m);
    if (special) {  // which NaN it is may differ
      for (size_t i = 0; i < r.out.size(); ++i) {
        if (std::isnan(r.out[i])) r.out[i] = NAN;
      }
      for (size_t i = 0; i < m; ++i) {
        if (std::isnan(r.scales[i])) r.scales[i] = NAN;
      }
    }
    return r;
  };
  const auto expected = run(kScalar);
  for (const Kernels* kernels : others()) {
    report(expected == run(*kernels), *kernels,
           "row operation " + std::to_string(static_cast<int>(op)) + " of " + std::to_string(m) + " x " +
               std::to_string(k) + (special ? " special values" : ""));
  }
}

enum Weights { kFloat32, kBfloat16, kInt8, kWeightKinds };

void check_linear(size_t m, size_t n, size_t k, int kind) {
  const auto x = random_floats(m * k), weight = random_floats(n * k), bias = random_floats(n);
  const auto row_scales = random_floats(n);
  Guarded<int8_t> codes(n * k);
  for (size_t i = 0; i < n * k; ++i) codes[i] = static_cast<int8_t>(rng() % 256);
  Guarded<uint16_t> half(n * k);
  for (size_t i = 0; i < n * k; ++i) {
    half[i] = static_cast<uint16_t>(rng() % 2 << 15 | (100 + rng() % 40) << 7 | rng() % 128);
  }
  const bool with_bias = rng() % 2, accumulate = rng() % 2;
  const auto run = [&](const Kernels& kernels) {
    Guarded<float> out(m * n);
    for (size_t i = 0; i < m * n; ++i) out[i] = 0.25f;
    LinearJob job{};
    job.x = x.data();
    job.x_stride = k;
    job.weight = kind == kFloat32 ? weight.data() : nullptr;
    job.weight_bf16 = kind == kBfloat16 ? half.data() : nullptr;
    job.weight_int8 = kind == kInt8 ? codes.data() : nullptr;
    job.row_scales = kind == kInt8 ? row_scales.data() : nullptr;
    job.rows = n;
    job.cols = k;
    job.bias = with_bias ? bias.data() : nullptr;
    job.accumulate = accumulate;
    job.out = out.data();
    job.out_stride = n;
    set_active(kernels);
    run_linear(job, m);
    return out;
  };
  const auto expected = run(kScalar);
  for (const Kernels* kernels : others()) {
    report(expected == run(*kernels), *kernels,
           "linear " + std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k));
  }
}

void check_rope(size_t m, size_t heads, size_t dim) {
  const auto x = random_floats(m * heads * dim);
  const auto cos = random_floats((m + 2) * dim / 2), sin = random_floats((m + 2) * dim / 2);
  const auto run = [&](const Kernels& kernels) {
    Guarded<float> y(x);
    set_active(kernels);
    run_rope({y.data(), heads * dim, heads, dim, cos.data(), sin.data(), 2}, m);
    return y;
  };
  const auto expected = run(kScalar);
  for (const Kernels* kernels : others()) {
    report(expected == run(*kernels), *kernels, "rope dim " + std::to_string(dim));
  }
}

void check_attention(size_t queries, size_t keys, size_t kv_heads, size_t group, size_t dim, bool causal) {
  const size_t heads = kv_heads * group, width = kv_heads * dim, gap = rng() % 3;
  const auto q = random_floats(queries * (heads * dim + gap)), k = random_floats(keys * (width + gap)),
             v = random_floats(keys * (width + gap));
  std::vector<float> packed_k, packed_v;
  const auto run = [&](const Kernels& kernels, bool packed) {
    Guarded<float> out(queries * heads * dim);
    AttentionJob job{};
    job.q = q.data();
    job.k = k.data() + gap * keys;  // so that the last row ends at the guard
    job.v = v.data() + gap * keys;
    job.q_stride = heads * dim + gap;
    job.k_stride = job.v_stride = width;
    job.queries = queries;
    job.keys = keys;
    job.heads = heads;
    job.kv_heads = kv_heads;
    job.dim = dim;
    job.scale = 1.0f / std::sqrt(static_cast<float>(dim));
    job.causal = causal;
    job.out = out.data();
    job.out_stride = heads * dim;
    set_active(kernels);
    if (packed) {
      job.packed_k_stride = padded(keys) * dim;
      job.packed_v_stride = keys * padded(dim);
      packed_k.assign(kv_heads * job.packed_k_stride, 0.0f);
      packed_v.assign(kv_heads * job.packed_v_stride, 0.0f);
      job.packed_k = packed_k.data();
      job.packed_v = packed_v.data();
      run_append(job, 0);
      job.k = job.v = nullptr;
    }
    run_attention(job);
    return out;
  };
  const auto expected = run(kScalar, false);
  report(expected == run(kScalar, true), kScalar, "attention of packed keys and values");
  for (const Kernels* kernels : others()) {
    report(expected == run(*kernels, keys % 2), *kernels,
           "attention of " + std::to_string(queries) + " queries, " + std::to_string(keys) + " keys, dim " +
               std::to_string(dim));
  }
}

void check_floats() {
  for (RowOp op : {RowOp::kCopy, RowOp::kRmsNorm, RowOp::kLayerNorm, RowOp::kRelu2GateNorm, RowOp::kGeluTanh,
                   RowOp::kGeluErf, RowOp::kRelu}) {
    for (size_t k = 1; k <= 70; ++k) check_rows(op, pick(1, 3), k, 1.0f, false);
    for (size_t k : {1152, 2560, 4304, 6912}) check_rows(op, 2, k, 3.0f, false);
    for (float size : {1e-6f, 1e-3f, 30.0f, 1e6f}) check_rows(op, 2, pick(1, 200), size, false);
    for (int i = 0; i < 10; ++i) check_rows(op, 2, pick(1, 100), 1.0f, true);
    check_rows(op, 70, 600, 1.0f, false);
  }
  for (size_t k = 1; k <= 70; ++k) check_linear(pick(1, 9), pick(1, 9), k, k % kWeightKinds);
  for (int i = 0; i < 60; ++i) check_linear(pick(1, 30), pick(1, 40), pick(1, 300), i % kWeightKinds);
  check_linear(40, 30, 2560, kFloat32);
  check_linear(8, 8, 17920, kBfloat16);
  check_linear(8, 8, 17920, kInt8);
  for (size_t dim = 2; dim <= 140; dim += 2) check_rope(pick(1, 5), pick(1, 3), dim);
  for (size_t dim = 1; dim <= 40; ++dim) check_attention(pick(1, 5), pick(5, 40), 1, 2, dim, dim % 2);
  for (size_t dim : {64, 72, 128, 255, 256}) check_attention(5, 150, 1, 2, dim, true);
  for (int i = 0; i < 40; ++i) {
    const size_t queries = pick(1, 60);
    check_attention(queries, queries + pick(0, 200), pick(1, 2), pick(1, 2), 4 * pick(1, 8), i % 2);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* required = argc == 3 && !std::strcmp(argv[1], "--require") ? argv[2] : nullptr;
  std::printf("sets:");
  for (const Kernels* const* k = available_kernels(); *k; ++k) std::printf(" %s", (*k)->name);
  std::printf("\n");
  if (required && !find_kernels(required)) {
    std::printf("NOT RUN: %s is not supported here\n", required);
    return 3;
  }
  set_num_threads(2);
  check_ternary_all();
  check_floats();
  check_threads();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
