// The ternary product, written once over Dot, the integer dot products of one instruction set.
//
// With codes u = w + 1 the product is sum(u a) - sum(a), and sum(a) comes with the activations. Two shapes:
//
//   few tokens   the packed blocks stream once, from memory straight into dot products (Dot::vector)
//   many tokens  a stripe of 64 rows is unpacked, a part of K at a time, and stays in the first-level cache while all
//                tokens pass (Dot::multiply); int32 sums wait in scratch between the parts of K
#pragma once

#include "floats.h"

namespace bitvla {
namespace {

constexpr size_t kStripe = 4;        // tiles of 16 rows unpacked together
constexpr size_t kStripeRows = kStripe * kTile;
constexpr size_t kTokenBlock = 384;  // tokens that pass one unpacked stripe

// Fetches what Dot::vector will read soon: processors' own prefetching ends with the page, this is one and a half ahead.
BITVLA_INLINE void prefetch(const uint8_t* packed) { __builtin_prefetch(packed + 6144); }

// Sums of one token and `count` rows from row n on, as the job wants them.
template <class F>
BITVLA_INLINE void finish(const TernaryJob& job, const int32_t* acc, size_t token, size_t n, size_t count) {
  const int32_t offset = job.in.sums[token];
  if (job.raw) {
    for (size_t i = 0; i < count; ++i) job.raw[token * job.raw_stride + n + i] = acc[i] - offset;
    return;
  }
  const F scale = F::set(job.weight_scale * job.in.scales[token]);
  float* out = job.out + token * job.out_stride + n;
  for (size_t i = 0; i < count; i += kLanes) {
    F y = F::from_int(acc + i, offset) * scale;
    if (job.bias) y = y + get<F>(job.bias + n + i, count - i);
    if (job.accumulate) y = get<F>(out + i, count - i) + y;
    put(out + i, y, count - i);
  }
}

// Dot::multiply with the numbers of tiles and of tokens as constants.
template <class Dot, int kTiles, int kTokens>
BITVLA_INLINE void multiply(size_t row_tiles, size_t tokens, const uint8_t* weights, const int8_t* codes, size_t stride,
                            size_t steps, int32_t* acc, bool first) {
  if constexpr (kTiles > 1) {
    if (row_tiles < kTiles) {
      return multiply<Dot, kTiles - 1, kTokens>(row_tiles, tokens, weights, codes, stride, steps, acc, first);
    }
  }
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) {
      return multiply<Dot, kTiles, kTokens - 1>(row_tiles, tokens, weights, codes, stride, steps, acc, first);
    }
  }
  Dot::template multiply<kTiles, kTokens>(weights, codes, stride, steps, acc, first);
}

template <class F, class Dot, Packing kPacking>
static void matrix_matrix(const TernaryJob& job, Range row_tiles, Range tokens, uint8_t* weights, int32_t* acc) {
  constexpr size_t kSteps = block_steps(kPacking);
  constexpr size_t kMost = Dot::kDepth / kSteps / 4 * 4;  // by fours: parts begin at multiples of 16 columns
  const size_t depth = blocks(kPacking, job.cols);
  const size_t parts = (depth + kMost - 1) / kMost, part = ((depth + parts - 1) / parts + 3) / 4 * 4;
  for (size_t t0 = row_tiles.begin; t0 < row_tiles.end; t0 += kStripe) {
    const size_t stripe = smaller(kStripe, row_tiles.end - t0);
    const size_t rows = smaller(stripe * kTile, job.rows - t0 * kTile);
    for (size_t b0 = 0; b0 < depth; b0 += part) {
      const size_t count = smaller(part, depth - b0), full = count * kSteps;
      const size_t steps = (full + 3) / 4 * 4;  // NEON takes them by fours
      for (size_t t = 0; t < stripe; t += Dot::kTiles) {
        const size_t height = smaller(Dot::kTiles, stripe - t);
        uint8_t* to = weights + t * steps * kBlockBytes;
        Dot::template unpack<kPacking>(job.packed + ((t0 + t) * depth + b0) * kBlockBytes, depth * kBlockBytes, height,
                                       count, to);
        __builtin_memset(to + full * height * kBlockBytes, 0, (steps - full) * height * kBlockBytes);
      }
      for (size_t m = tokens.begin; m < tokens.end; m += Dot::kTokens) {
        const size_t group = smaller(Dot::kTokens, tokens.end - m);
        int32_t* sums = acc + (m - tokens.begin) * kStripeRows;
        for (size_t t = 0; t < stripe; t += Dot::kTiles) {
          multiply<Dot, Dot::kTiles, Dot::kTokens>(stripe - t, group, weights + t * steps * kBlockBytes,
                                                   job.in.codes + m * job.in.stride + b0 * 4 * kSteps, job.in.stride,
                                                   steps, sums + t * kTile, b0 == 0);
        }
        if (b0 + count < depth) continue;
        for (size_t i = 0; i < group; ++i) finish<F>(job, sums + i * kStripeRows, m + i, t0 * kTile, rows);
      }
    }
  }
}

template <class F, class Dot, Packing kPacking, int kTokens>
BITVLA_INLINE void tile_vector(const TernaryJob& job, size_t tile, size_t token) {
  const size_t depth = blocks(kPacking, job.cols);
  alignas(64) int32_t acc[kTokens][kTile];
  Dot::template vector<kPacking, kTokens>(job.packed + tile * depth * kBlockBytes,
                                          job.in.codes + token * job.in.stride, job.in.stride, depth, acc[0]);
  for (int i = 0; i < kTokens; ++i) {
    finish<F>(job, acc[i], token + i, tile * kTile, smaller(kTile, job.rows - tile * kTile));
  }
}

template <class F, class Dot, Packing kPacking>
static void matrix_vector(const TernaryJob& job, Range row_tiles, Range tokens) {
  for (size_t t = row_tiles.begin; t < row_tiles.end; ++t) {
    size_t m = tokens.begin;
    for (; m + 4 <= tokens.end; m += 4) tile_vector<F, Dot, kPacking, 4>(job, t, m);
    if (tokens.end - m == 3) tile_vector<F, Dot, kPacking, 3>(job, t, m);
    if (tokens.end - m == 2) tile_vector<F, Dot, kPacking, 2>(job, t, m);
    if (tokens.end - m == 1) tile_vector<F, Dot, kPacking, 1>(job, t, m);
  }
}

template <class F, class Dot, Packing kPacking>
static void product(const TernaryJob& job, Range row_tiles, Range tokens, void* scratch) {
  static_assert(kStripe * Dot::kDepth * kBlockBytes + kTokenBlock * kStripeRows * 4 <= kTernaryScratch);
  static_assert(kStripe % Dot::kTiles == 0 && kTokenBlock % Dot::kTokens == 0);
  if (tokens.end - tokens.begin <= Dot::template kFewTokens<kPacking>) {
    return matrix_vector<F, Dot, kPacking>(job, row_tiles, tokens);
  }
  uint8_t* weights = static_cast<uint8_t*>(scratch);
  int32_t* acc = reinterpret_cast<int32_t*>(weights + kStripe * Dot::kDepth * kBlockBytes);
  for (size_t m = tokens.begin; m < tokens.end; m += kTokenBlock) {
    matrix_matrix<F, Dot, kPacking>(job, row_tiles, {m, smaller(m + kTokenBlock, tokens.end)}, weights, acc);
  }
}

template <class F, class Dot>
static void ternary(const TernaryJob& job, Range row_tiles, Range tokens, void* scratch) {
  const bool base3 = job.packing == Packing::kBase3;
  (base3 ? product<F, Dot, Packing::kBase3> : product<F, Dot, Packing::k2Bit>)(job, row_tiles, tokens, scratch);
}

}  // namespace
}  // namespace bitvla
