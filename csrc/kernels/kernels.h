// The whole interface between the kernels of one instruction set and the rest of the library.
//
// A packed ternary matrix of N rows and K columns is cut into blocks of 64 bytes: 16 rows by 4 steps of 4 columns at 2
// bits a weight, by 5 steps in base 3. A weight w is stored as the code w + 1, and padding has code 1 (w = 0). Byte
// 4 * r + j of a block holds row r and, for each step p, column 4p + j:
//
//   2 bits   code p = byte >> 2p & 3
//   base 3   byte = ceil(v * 256 / 243), v the number with the digits code 0, 1, .. 4; so, with x0 = byte,
//            3 x_p = 256 code p + x_(p+1)
//
// and the codes p of all bytes are the operand of a 4-way dot product for 16 rows. The blocks of 16 rows follow each
// other along K: uint8[ceil(N / 16)][ceil(K / 16 or 20)][64].
//
// A kernel handles the part of a job that its ranges name, on one thread; ops.cpp cuts jobs into such tasks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitvla {

constexpr size_t kTile = 16;        // rows of a packed block
constexpr size_t kBlockBytes = 64;  // of a packed block
constexpr size_t kLanes = 16;       // of the virtual float vector: fixes the order of every float sum

enum class Packing { k2Bit, kBase3 };

struct Range {
  size_t begin, end;
};

// Activations: int8 codes in rows padded with 0 to code_columns, and for each token a scale and the sum of codes.
struct Quantized {
  int8_t* codes;
  size_t stride;
  float* scales;
  int32_t* sums;
};

enum class RowOp { kCopy, kRmsNorm, kLayerNorm, kRelu2GateNorm, kGeluTanh, kGeluErf, kRelu };

// y = op(x), token by token; y goes to out, or quantised to codes where out is null.
struct RowJob {
  RowOp op;
  const float* x;
  size_t x_stride;
  const float* up;  // kRelu2GateNorm: y = rms_norm(relu(x)^2 * up) * weight
  size_t up_stride;
  const float* weight;
  const float* bias;
  float eps;
  size_t width;
  float* out;
  size_t out_stride;
  Quantized codes;
};

// out = float(w . a) * (weight_scale * scale) + bias, added to out where accumulate is set; raw = w . a if not null.
struct TernaryJob {
  Quantized in;
  const uint8_t* packed;
  Packing packing;
  size_t rows, cols;
  float weight_scale;
  const float* bias;
  bool accumulate;
  float* out;
  size_t out_stride;
  int32_t* raw;
  size_t raw_stride;
};

// out = x @ weight.T + bias with weight[rows][cols] as float32, as bfloat16, or as int8 times a scale for each row:
// whichever is not null.
struct LinearJob {
  const float* x;
  size_t x_stride;
  const float* weight;
  const uint16_t* weight_bf16;
  const int8_t* weight_int8;
  const float* row_scales;
  size_t rows, cols;
  const float* bias;
  bool accumulate;
  float* out;
  size_t out_stride;
};

struct RopeJob {
  float* x;
  size_t x_stride, heads, dim;
  const float* cos;  // [positions][dim / 2]
  const float* sin;
  size_t start;
};

// One task is up to kQueryBlock rows: queries of the heads that share keys and values, head after head. out may be q: a
// task copies its queries before it writes their answers.
struct AttentionJob {
  const float *q, *k, *v;
  size_t q_stride, k_stride, v_stride;
  size_t queries, keys, heads, kv_heads, dim;
  float scale;
  bool causal;
  float* out;
  size_t out_stride;
  // What attention reads in order; complete already where k and v are null. Strides are those from head to head.
  float* packed_k;  // [kv_heads][tiles][dim][16]: lanes are keys
  float* packed_v;  // [kv_heads][keys][padded(dim)]; null where values are read in place, for which dim % 16 is 0
  size_t packed_k_stride, packed_v_stride;
};

constexpr size_t kMaxColumns = size_t{1} << 18;  // of a ternary matrix: int32 sums of 64-fold codes stay exact
constexpr size_t kMaxHeadDim = 256;
constexpr size_t kQueryBlock = 24;               // rows of one attention task
constexpr size_t kKeyBlock = 128;                // keys between two updates of the running maximum
constexpr size_t kTernaryScratch = 160 * 1024;   // bytes
constexpr size_t kAttentionScratch = 96 * 1024;  // bytes

static constexpr size_t padded(size_t n) { return (n + kTile - 1) / kTile * kTile; }
static constexpr size_t tiles(size_t n) { return (n + kTile - 1) / kTile; }
static constexpr size_t block_steps(Packing packing) { return packing == Packing::kBase3 ? 5 : 4; }
static constexpr size_t blocks(Packing packing, size_t cols) {
  return (cols + 4 * block_steps(packing) - 1) / (4 * block_steps(packing));
}
static constexpr size_t code_columns(size_t cols) { return (cols + 79) / 80 * 80; }  // whole blocks of both packings
static constexpr size_t query_blocks(const AttentionJob& job) {
  return (job.heads / job.kv_heads * job.queries + kQueryBlock - 1) / kQueryBlock;
}

struct Kernels {
  const char* name;
  void (*rows)(const RowJob&, Range tokens, float* scratch);  // scratch: padded(width) floats
  void (*ternary)(const TernaryJob&, Range tiles, Range tokens, void* scratch);
  void (*linear)(const LinearJob&, Range rows, Range tokens);
  void (*rope)(const RopeJob&, Range tokens);
  void (*attention_pack)(const AttentionJob&, Range groups);  // of 16 tokens, kv_heads * tiles(keys) in all
  void (*attention)(const AttentionJob&, Range tasks, void* scratch);  // kv_heads * query_blocks in all
  uint64_t (*dot_peak)(uint64_t iterations);  // dot products on registers only; returns the multiply-adds done
};

extern const Kernels kScalar, kAvx2, kAvx512Vnni, kNeon;

// The sets this processor can run, fastest first; ends with null. Scalar is always last.
const Kernels* const* available_kernels();
const Kernels* find_kernels(const char* name);  // null where unknown or not available here

}  // namespace bitvla
