// Float kernels, written once over F, a vector of 16 floats that every instruction set defines.
//
// Every operation of F is exactly rounded and every sum has one order (16 lanes, then a fixed tree), so all instruction
// sets give the same bits. Everything here has internal linkage, so that no copy compiled for one instruction set can
// be linked into code that runs on another.
#pragma once

#include "kernels.h"

#define BITVLA_INLINE static inline __attribute__((always_inline))
#define BITVLA_APART static __attribute__((noinline))  // inner loops that need every register for themselves

namespace bitvla {
namespace {

constexpr float kLaneIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float kLowest = -3.402823466e38f;

BITVLA_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

template <class F>
BITVLA_INLINE F get(const float* x, size_t count) {
  return count >= kLanes ? F::load(x) : F::load(x, count);
}

template <class F>
BITVLA_INLINE void put(float* out, F x, size_t count) {
  if (count >= kLanes) {
    store(out, x);
  } else {
    store(out, x, count);
  }
}

// x in the first `count` lanes, `value` in the others.
template <class F>
BITVLA_INLINE F keep(F x, size_t count, float value) {
  return if_greater(F::set(static_cast<float>(count)), F::load(kLaneIndex), x, F::set(value));
}

// ---- elementary functions ------------------------------------------------------------------------------------------

// e^x to 1e-7 relative, x clamped to [-87, 88]; exactly 1 at 0.
template <class F>
BITVLA_INLINE F exponential(F x) {
  x = min(max(x, F::set(-87.0f)), F::set(88.0f));
  const F n = round(x * F::set(1.44269504088896341f));
  F r = fma(n, F::set(-0.693359375f), x);  // ln 2 in two parts, so that n times the first is exact
  r = fma(n, F::set(2.12194440054690583e-4f), r);
  F p = F::set(1.394609117e-3f);
  p = fma(p, r, F::set(8.369079722e-3f));
  p = fma(p, r, F::set(4.166626958e-2f));
  p = fma(p, r, F::set(1.666651678e-1f));
  p = fma(p, r, F::set(5.000000078e-1f));
  p = fma(p * r, r, r) + F::set(1.0f);
  return p * power_of_two(n);
}

// erfc(z) for z >= 0, as t * e^(P(t) - z^2) with t = 1 / (1 + z / 2); P is a least-squares fit on [0, 9.5].
template <class F>
BITVLA_INLINE F complementary_error(F z) {
  const F t = F::set(1.0f) / fma(z, F::set(0.5f), F::set(1.0f));
  F p = F::set(1.405071339e-1f);
  p = fma(p, t, F::set(-6.566158318e-1f));
  p = fma(p, t, F::set(1.099438465e+0f));
  p = fma(p, t, F::set(-6.195233323e-1f));
  p = fma(p, t, F::set(-1.441735029e-1f));
  p = fma(p, t, F::set(3.546786262e-2f));
  p = fma(p, t, F::set(2.287414323e-2f));
  p = fma(p, t, F::set(3.891171466e-1f));
  p = fma(p, t, F::set(9.983414489e-1f));
  p = fma(p, t, F::set(-1.265433489e+0f));
  return t * exponential(fma(F::set(0.0f) - z, z, p));
}

template <class F>
BITVLA_INLINE F gelu_erf(F x) {
  const F tail = F::set(0.5f) * x * complementary_error(abs(x) * F::set(0.707106781186547524f));
  return if_greater(x, F::set(0.0f), x - tail, tail);
}

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class F>
BITVLA_INLINE F gelu_tanh(F x) {
  const F cubic = fma(F::set(0.044715f) * x * x, x, x);
  return x / (F::set(1.0f) + exponential(cubic * F::set(-1.59576912160573071f)));
}

// ---- token by token: norms, activations, quantisation --------------------------------------------------------------

template <class F>
static void gelu_row(RowOp op, const float* x, size_t width, float* y) {
  for (size_t i = 0; i < width; i += kLanes) {
    const F v = get<F>(x + i, width - i);
    put(y + i, op == RowOp::kGeluTanh ? gelu_tanh(v) : gelu_erf(v), width - i);
  }
}

// y = x / rms(x) * weight; x may be y.
template <class F>
static void rms_norm_row(const float* x, const float* weight, float eps, size_t width, float* y) {
  F squares = F::set(0.0f);
  for (size_t i = 0; i < width; i += kLanes) {
    const F v = get<F>(x + i, width - i);
    squares = fma(v, v, squares);
  }
  const F scale = F::set(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps));
  for (size_t i = 0; i < width; i += kLanes) {
    put(y + i, get<F>(x + i, width - i) * scale * get<F>(weight + i, width - i), width - i);
  }
}

template <class F>
static void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, size_t width, float* y) {
  F total = F::set(0.0f);
  for (size_t i = 0; i < width; i += kLanes) total = total + get<F>(x + i, width - i);
  const F mean = F::set(sum(total) / static_cast<float>(width));
  F squares = F::set(0.0f);
  for (size_t i = 0; i < width; i += kLanes) {
    const F v = keep(get<F>(x + i, width - i) - mean, width - i, 0.0f);
    squares = fma(v, v, squares);
  }
  const F scale = F::set(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps));
  for (size_t i = 0; i < width; i += kLanes) {
    const F v = (get<F>(x + i, width - i) - mean) * scale;
    put(y + i, fma(v, get<F>(weight + i, width - i), get<F>(bias + i, width - i)), width - i);
  }
}

// codes = round(127 x / max|x|), half to even; their padding becomes 0.
template <class F>
static void quantize_row(const float* x, size_t width, int8_t* codes, float* scale, int32_t* sum_of_codes) {
  F largest = F::set(1e-5f);
  for (size_t i = 0; i < width; i += kLanes) largest = max(largest, abs(get<F>(x + i, width - i)));
  const float bound = maximum(largest);
  const F inverse = F::set(127.0f / bound);
  for (size_t i = 0; i < width; i += kLanes) {
    const F v = get<F>(x + i, width - i) * inverse;
    store_codes(codes + i, min(max(v, F::set(-128.0f)), F::set(127.0f)));
  }
  __builtin_memset(codes + padded(width), 0, code_columns(width) - padded(width));
  int32_t total = 0;
  for (size_t i = 0; i < width; ++i) total += codes[i];
  *scale = bound / 127.0f;
  *sum_of_codes = total;
}

template <class F>
static void rows(const RowJob& job, Range tokens, float* scratch) {
  const F zero = F::set(0.0f);
  for (size_t m = tokens.begin; m < tokens.end; ++m) {
    const float* x = job.x + m * job.x_stride;
    float* y = job.out ? job.out + m * job.out_stride : scratch;
    switch (job.op) {
      case RowOp::kCopy:
        break;  // only ever quantised, straight from x
      case RowOp::kRmsNorm:
        rms_norm_row<F>(x, job.weight, job.eps, job.width, y);
        break;
      case RowOp::kLayerNorm:
        layer_norm_row<F>(x, job.weight, job.bias, job.eps, job.width, y);
        break;
      case RowOp::kRelu2GateNorm: {
        const float* up = job.up + m * job.up_stride;
        for (size_t i = 0; i < job.width; i += kLanes) {
          const F gate = max(get<F>(x + i, job.width - i), zero);
          put(y + i, gate * gate * get<F>(up + i, job.width - i), job.width - i);
        }
        rms_norm_row<F>(y, job.weight, job.eps, job.width, y);
        break;
      }
      case RowOp::kGeluTanh:
      case RowOp::kGeluErf:
        gelu_row<F>(job.op, x, job.width, y);
        break;
      case RowOp::kRelu:
        for (size_t i = 0; i < job.width; i += kLanes) {
          put(y + i, max(get<F>(x + i, job.width - i), zero), job.width - i);
        }
        break;
    }
    if (!job.out) {
      quantize_row<F>(job.op == RowOp::kCopy ? x : y, job.width, job.codes.codes + m * job.codes.stride,
                      job.codes.scales + m, job.codes.sums + m);
    }
  }
}

// ---- rotary position embedding, halves (i, i + dim / 2) rotated together -------------------------------------------

template <class F>
static void rope(const RopeJob& job, Range tokens) {
  const size_t half = job.dim / 2;
  for (size_t m = tokens.begin; m < tokens.end; ++m) {
    const float* cos = job.cos + (job.start + m) * half;
    const float* sin = job.sin + (job.start + m) * half;
    for (size_t h = 0; h < job.heads; ++h) {
      float* first = job.x + m * job.x_stride + h * job.dim;
      float* second = first + half;
      for (size_t i = 0; i < half; i += kLanes) {
        const size_t n = half - i;
        const F a = get<F>(first + i, n), b = get<F>(second + i, n), c = get<F>(cos + i, n), s = get<F>(sin + i, n);
        put(first + i, a * c - b * s, n);
        put(second + i, b * c + a * s, n);
      }
    }
  }
}

// ---- full-precision product: lanes run along K, so that rows of weights stream as they lie -------------------------

template <class F>
BITVLA_INLINE F get(const uint16_t* x, size_t count) {
  return count >= kLanes ? F::load_bf16(x) : F::load_bf16(x, count);
}

template <class F>
BITVLA_INLINE F get(const int8_t* x, size_t count) {
  return count >= kLanes ? F::load_int8(x) : F::load_int8(x, count);
}

template <class F, class W, int kTokens, int kRows>
BITVLA_APART void linear_tile(const LinearJob& job, const W* weight, size_t m0, size_t n0) {
  F acc[kTokens][kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kRows; ++n) acc[m][n] = F::set(0.0f);
  }
  const float* x = job.x + m0 * job.x_stride;
  const W* w = weight + n0 * job.cols;
  const auto step = [&](size_t k, size_t count) __attribute__((always_inline)) {
    F row[kRows];
#pragma GCC unroll 8
    for (int n = 0; n < kRows; ++n) {
      row[n] = get<F>(w + n * job.cols + k, count);
      // A single token waits for memory, whose own prefetching stops where a row ends: ask for the rows that follow.
      if (kTokens == 1) __builtin_prefetch(w + (n + kRows) * job.cols + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
      const F v = get<F>(x + m * job.x_stride + k, count);
#pragma GCC unroll 8
      for (int n = 0; n < kRows; ++n) acc[m][n] = fma(v, row[n], acc[m][n]);
    }
  };
  size_t k = 0;
  for (; k + kLanes <= job.cols; k += kLanes) step(k, kLanes);
  if (k < job.cols) step(k, job.cols - k);
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kRows; ++n) {
      float* out = job.out + (m0 + m) * job.out_stride + n0 + n;
      float y = sum(acc[m][n]);
      if (job.row_scales) y *= job.row_scales[n0 + n];
      if (job.bias) y += job.bias[n0 + n];
      *out = job.accumulate ? *out + y : y;
    }
  }
}

template <class F, class W>
static void linear_of(const LinearJob& job, const W* weight, Range rows, Range tokens) {
  constexpr size_t kCache = 64 * 1024;  // floats of activations kept in the second-level cache
  constexpr size_t kM = F::kLinearTokens, kN = F::kLinearRows;
  const size_t block = (kCache / (job.cols + 1) + kM) / kM * kM;
  for (size_t begin = tokens.begin; begin < tokens.end; begin += block) {
    const size_t end = smaller(begin + block, tokens.end);
    size_t n = rows.begin;
    for (; n + kN <= rows.end; n += kN) {
      size_t m = begin;
      for (; m + kM <= end; m += kM) linear_tile<F, W, kM, kN>(job, weight, m, n);
      for (; m < end; ++m) linear_tile<F, W, 1, kN>(job, weight, m, n);
    }
    for (; n < rows.end; ++n) {
      size_t m = begin;
      for (; m + kM <= end; m += kM) linear_tile<F, W, kM, 1>(job, weight, m, n);
      for (; m < end; ++m) linear_tile<F, W, 1, 1>(job, weight, m, n);
    }
  }
}

template <class F>
static void linear(const LinearJob& job, Range rows, Range tokens) {
  if (job.weight) {
    linear_of<F>(job, job.weight, rows, tokens);
  } else if (job.weight_int8) {
    linear_of<F>(job, job.weight_int8, rows, tokens);
  } else {
    linear_of<F>(job, job.weight_bf16, rows, tokens);
  }
}

// ---- attention: blocks of 24 queries against blocks of 128 keys, softmax renormalised from block to block ----------

constexpr size_t kQueryStride = kMaxHeadDim + kLanes;  // not a power of two: rows must not share cache sets
constexpr size_t kScoreStride = kKeyBlock + kLanes;
constexpr size_t kFewRows = 4;  // a decoder's step: one query of a few heads

struct AttentionScratch {
  float q[kQueryBlock][kQueryStride];
  float out[kQueryBlock][kQueryStride];
  float p[kQueryBlock][kScoreStride];
  float sums[kQueryBlock][kLanes];
  float highest[padded(kQueryBlock)];
  float decay[padded(kQueryBlock)];
};
static_assert(sizeof(AttentionScratch) <= kAttentionScratch);

// c[r][16 j ..] = c * decay[r] + sum over k of a[r][k] * b[k * b_stride + j * b_step ..]; starts at 0 without decay.
template <class F, size_t kStrideA, size_t kStrideC, int kRows, int kVectors>
BITVLA_APART void panel(const float* a, const float* b, size_t b_stride, size_t b_step, size_t depth, float* c,
                  const float* decay) {
  F acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      acc[r][j] = decay ? F::load(c + r * kStrideC + j * kLanes) * F::set(decay[r]) : F::set(0.0f);
    }
  }
  for (size_t k = 0; k < depth; ++k) {
    F row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = F::load(b + k * b_stride + j * b_step);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F v = F::set(a[r * kStrideA + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[r][j] = fma(v, row[j], acc[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + r * kStrideC + j * kLanes, acc[r][j]);
  }
}

// panel() over `rows` rows, rounded up, and `vectors` vectors.
template <class F, size_t kStrideA, size_t kStrideC, int kVectors>
static void panels_of(size_t rows, const float* a, const float* b, size_t b_stride, size_t b_step, size_t depth,
                      float* c, const float* decay) {
  constexpr int kR = F::kPanelRows, kFew = kR < int{kFewRows} ? kR : kFewRows;
  static_assert(kQueryBlock % kR == 0);
  for (size_t r = 0; r < rows; r += kR) {
    (rows - r <= kFew ? panel<F, kStrideA, kStrideC, kFew, kVectors> : panel<F, kStrideA, kStrideC, kR, kVectors>)(
        a + r * kStrideA, b, b_stride, b_step, depth, c + r * kStrideC, decay ? decay + r : nullptr);
  }
}

template <class F, size_t kStrideA, size_t kStrideC>
static void panels(size_t rows, size_t vectors, const float* a, const float* b, size_t b_stride, size_t b_step,
                   size_t depth, float* c, const float* decay) {
  constexpr int kV = F::kPanelVectors;
  static_assert(kV <= 2);
  for (size_t j = 0; j < vectors; j += kV) {
    (j + kV <= vectors ? panels_of<F, kStrideA, kStrideC, kV> : panels_of<F, kStrideA, kStrideC, 1>)(
        rows, a, b + j * b_step, b_stride, b_step, depth, c + j * kLanes, decay);
  }
}

// Copies keys and values to where attention reads them in order; one task is 16 tokens of one head.
static void attention_pack(const AttentionJob& job, Range groups) {
  const size_t per_head = tiles(job.keys), width = padded(job.dim);
  for (size_t group = groups.begin; group < groups.end; ++group) {
    const size_t head = group / per_head, first = group % per_head * kLanes;
    float* packed_k = job.packed_k + head * job.packed_k_stride + first * job.dim;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t key = first + lane;
      if (key >= job.keys) {
        for (size_t d = 0; d < job.dim; ++d) packed_k[d * kLanes + lane] = 0.0f;
        continue;
      }
      const float* k = job.k + key * job.k_stride + head * job.dim;
      for (size_t d = 0; d < job.dim; ++d) packed_k[d * kLanes + lane] = k[d];
      const float* v = job.v + key * job.v_stride + head * job.dim;
      if (!job.packed_v) continue;
      float* packed_v = job.packed_v + head * job.packed_v_stride + key * width;
      for (size_t d = 0; d < width; ++d) packed_v[d] = d < job.dim ? v[d] : 0.0f;
    }
  }
}

template <class F>
static void attention_task(const AttentionJob& job, size_t task, AttentionScratch& s) {
  const size_t blocks = query_blocks(job), kv_head = task / blocks, first = task % blocks * kQueryBlock;
  const size_t group = job.heads / job.kv_heads, rows = smaller(kQueryBlock, group * job.queries - first);
  const size_t width = padded(job.dim);
  const float* packed_k = job.packed_k + kv_head * job.packed_k_stride;
  const float* v = job.packed_v ? job.packed_v + kv_head * job.packed_v_stride : job.v + kv_head * job.dim;
  const size_t v_stride = job.packed_v ? width : job.v_stride;
  const auto query = [&](size_t row) { return (first + row) % job.queries; };
  const auto column = [&](size_t row) { return (kv_head * group + (first + row) / job.queries) * job.dim; };
  const auto visible = [&](size_t row) { return job.causal ? job.keys - job.queries + query(row) + 1 : job.keys; };
  size_t most = 0;
  for (size_t r = 0; r < rows; ++r) most = visible(r) > most ? visible(r) : most;

  for (size_t r = 0; r < (rows <= kFewRows ? kFewRows : kQueryBlock); ++r) {  // what panels_of() touches
    const float* q = job.q + query(r) * job.q_stride + column(r);
    for (size_t d = 0; d < job.dim; ++d) s.q[r][d] = r < rows ? q[d] * job.scale : 0.0f;
    for (size_t d = 0; d < width; ++d) s.out[r][d] = 0.0f;
    for (size_t d = 0; d < kScoreStride; ++d) s.p[r][d] = 0.0f;
    store(s.sums[r], F::set(0.0f));
    s.highest[r] = kLowest;
    s.decay[r] = 0.0f;
  }
  for (size_t key = 0; key < most; key += kKeyBlock) {
    const size_t keys = smaller(kKeyBlock, job.keys - key);
    panels<F, kQueryStride, kScoreStride>(rows, tiles(keys), s.q[0], packed_k + key * job.dim, kLanes,
                                          job.dim * kLanes, job.dim, s.p[0], nullptr);
    float before[padded(kQueryBlock)];
    for (size_t r = 0; r < rows; ++r) {
      const size_t seen = visible(r) > key ? smaller(keys, visible(r) - key) : 0;
      F highest = F::set(s.highest[r]);
      size_t i = 0;
      for (; i + kLanes <= seen; i += kLanes) highest = max(highest, F::load(s.p[r] + i));
      if (i < seen) highest = max(highest, keep(F::load(s.p[r] + i), seen - i, kLowest));
      before[r] = s.highest[r];
      s.highest[r] = maximum(highest);
    }
    for (size_t r = rows; r < padded(kQueryBlock); ++r) before[r] = s.highest[r] = 0.0f;
    for (size_t r = 0; r < padded(kQueryBlock); r += kLanes) {
      store(s.decay + r, exponential(F::load(before + r) - F::load(s.highest + r)));
    }
    for (size_t r = 0; r < rows; ++r) {
      const size_t seen = visible(r) > key ? smaller(keys, visible(r) - key) : 0;
      const F highest = F::set(s.highest[r]);
      F total = F::load(s.sums[r]) * F::set(s.decay[r]);
      for (size_t i = 0; i < keys; i += kLanes) {
        F p = exponential(F::load(s.p[r] + i) - highest);
        if (i + kLanes > seen) p = i < seen ? keep(p, seen - i, 0.0f) : F::set(0.0f);
        store(s.p[r] + i, p);
        total = total + p;
      }
      store(s.sums[r], total);
    }
    panels<F, kScoreStride, kQueryStride>(rows, width / kLanes, s.p[0], v + key * v_stride, v_stride, kLanes, keys,
                                          s.out[0], s.decay);
  }
  for (size_t r = 0; r < rows; ++r) {
    float* out = job.out + query(r) * job.out_stride + column(r);
    const F inverse = F::set(1.0f / sum(F::load(s.sums[r])));
    for (size_t d = 0; d < job.dim; d += kLanes) put(out + d, F::load(s.out[r] + d) * inverse, job.dim - d);
  }
}

template <class F>
static void attention(const AttentionJob& job, Range tasks, void* scratch) {
  for (size_t task = tasks.begin; task < tasks.end; ++task) {
    attention_task<F>(job, task, *static_cast<AttentionScratch*>(scratch));
  }
}

}  // namespace
}  // namespace bitvla
