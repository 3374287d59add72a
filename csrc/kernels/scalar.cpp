// The reference: every other instruction set must give the same bits.
#include "floats.h"

namespace bitvla {
namespace {

struct F16 {
  float v[kLanes];

  static constexpr int kLinearTokens = 2, kLinearRows = 2;
  static constexpr int kPanelRows = 2, kPanelVectors = 1;

  static F16 load(const float* p, size_t count = kLanes) {
    F16 x;
    for (size_t i = 0; i < kLanes; ++i) x.v[i] = i < count ? p[i] : 0.0f;
    return x;
  }
  static F16 load_int8(const int8_t* p, size_t count = kLanes) {
    F16 x;
    for (size_t i = 0; i < kLanes; ++i) x.v[i] = i < count ? static_cast<float>(p[i]) : 0.0f;
    return x;
  }
  static F16 load_bf16(const uint16_t* p, size_t count = kLanes) {
    F16 x;
    for (size_t i = 0; i < kLanes; ++i) {
      const uint32_t bits = i < count ? static_cast<uint32_t>(p[i]) << 16 : 0;
      __builtin_memcpy(&x.v[i], &bits, sizeof bits);
    }
    return x;
  }
  static F16 set(float value) {
    F16 x;
    for (float& v : x.v) v = value;
    return x;
  }
};

template <class Op>
F16 lanewise(const F16& a, const F16& b, Op op) {
  F16 y;
  for (size_t i = 0; i < kLanes; ++i) y.v[i] = op(a.v[i], b.v[i]);
  return y;
}

void store(float* p, const F16& x, size_t count = kLanes) {
  for (size_t i = 0; i < count; ++i) p[i] = x.v[i];
}
void store_codes(int8_t* p, const F16& x) {
  for (size_t i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(__builtin_rintf(x.v[i]));
}

F16 operator+(const F16& a, const F16& b) { return lanewise(a, b, [](float x, float y) { return x + y; }); }
F16 operator-(const F16& a, const F16& b) { return lanewise(a, b, [](float x, float y) { return x - y; }); }
F16 operator*(const F16& a, const F16& b) { return lanewise(a, b, [](float x, float y) { return x * y; }); }
F16 operator/(const F16& a, const F16& b) { return lanewise(a, b, [](float x, float y) { return x / y; }); }
F16 max(const F16& a, const F16& b) { return lanewise(a, b, [](float x, float y) { return x > y ? x : y; }); }
F16 min(const F16& a, const F16& b) { return lanewise(a, b, [](float x, float y) { return x < y ? x : y; }); }
F16 abs(const F16& a) { return lanewise(a, a, [](float x, float) { return __builtin_fabsf(x); }); }
F16 round(const F16& a) { return lanewise(a, a, [](float x, float) { return __builtin_rintf(x); }); }
F16 power_of_two(const F16& a) {
  return lanewise(a, a, [](float x, float) { return __builtin_ldexpf(1.0f, static_cast<int>(x)); });
}

F16 fma(const F16& a, const F16& b, const F16& c) {
  F16 y;
  for (size_t i = 0; i < kLanes; ++i) y.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return y;
}
F16 if_greater(const F16& a, const F16& b, const F16& x, const F16& y) {
  F16 z;
  for (size_t i = 0; i < kLanes; ++i) z.v[i] = a.v[i] > b.v[i] ? x.v[i] : y.v[i];
  return z;
}

// The order of every sum over lanes: halves onto halves.
float sum(F16 x) {
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  }
  return x.v[0];
}
float maximum(F16 x) {
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) x.v[i] = x.v[i] > x.v[i + half] ? x.v[i] : x.v[i + half];
  }
  return x.v[0];
}

int weight(const TernaryJob& job, size_t row, size_t col) {
  const size_t width = 4 * block_steps(job.packing), step = col % width / 4;
  const uint8_t* block = job.packed + (row / kTile * blocks(job.packing, job.cols) + col / width) * kBlockBytes;
  unsigned byte = block[row % kTile * 4 + col % 4];
  if (job.packing == Packing::k2Bit) return static_cast<int>(byte >> 2 * step & 3) - 1;
  for (size_t p = 0; p < step; ++p) byte = 3 * byte % 256;
  return static_cast<int>(3 * byte / 256) - 1;
}

void ternary(const TernaryJob& job, Range row_tiles, Range tokens, void*) {
  for (size_t n = row_tiles.begin * kTile; n < smaller(row_tiles.end * kTile, job.rows); ++n) {
    for (size_t m = tokens.begin; m < tokens.end; ++m) {
      const int8_t* codes = job.in.codes + m * job.in.stride;
      int32_t acc = 0;
      for (size_t k = 0; k < job.cols; ++k) acc += weight(job, n, k) * codes[k];
      if (job.raw) {
        job.raw[m * job.raw_stride + n] = acc;
        continue;
      }
      float y = static_cast<float>(acc) * (job.weight_scale * job.in.scales[m]);
      if (job.bias) y = y + job.bias[n];
      float* out = job.out + m * job.out_stride + n;
      *out = job.accumulate ? *out + y : y;
    }
  }
}

uint64_t dot_peak(uint64_t iterations) {
  int8_t weights[64], codes[64];
  for (int i = 0; i < 64; ++i) {
    weights[i] = static_cast<int8_t>(i % 3 - 1);
    codes[i] = static_cast<int8_t>(i);
  }
  int32_t acc = 0;
  for (uint64_t i = 0; i < iterations; ++i) {
    for (int k = 0; k < 64; ++k) acc += weights[k] * codes[k];
    asm volatile("" : "+r"(acc) : "r"(weights), "r"(codes) : "memory");
  }
  return iterations * 64;
}

}  // namespace

const Kernels kScalar = {"scalar",       rows<F16>,      ternary,        linear<F16>, rope<F16>,
                         attention_pack, attention<F16>, dot_peak};

}  // namespace bitvla
