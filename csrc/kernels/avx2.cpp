// AVX2 with FMA: two registers hold 16 floats; pairs of codes are multiplied and added in 16 bits.
#include <immintrin.h>

#include "ternary.h"

namespace bitvla {
namespace {

struct F16 {
  __m256 lo, hi;

  static constexpr int kLinearTokens = 2, kLinearRows = 3;
  static constexpr int kPanelRows = 6, kPanelVectors = 1;

  BITVLA_INLINE __m256i first(size_t count, int offset) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count) - offset), lanes);
  }

  BITVLA_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  BITVLA_INLINE F16 load(const float* p, size_t count) {
    return {_mm256_maskload_ps(p, first(count, 0)), _mm256_maskload_ps(p + 8, first(count, 8))};
  }
  BITVLA_INLINE __m256 widen(const uint16_t* bf16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  BITVLA_INLINE F16 load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
  BITVLA_INLINE F16 load_bf16(const uint16_t* p, size_t count) {
    uint16_t full[kLanes] = {};
    __builtin_memcpy(full, p, count * sizeof *p);
    return load_bf16(full);
  }
  BITVLA_INLINE __m256 widen(const int8_t* codes) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v));
  }
  BITVLA_INLINE F16 load_int8(const int8_t* p) { return {widen(p), widen(p + 8)}; }
  BITVLA_INLINE F16 load_int8(const int8_t* p, size_t count) {
    int8_t full[kLanes] = {};
    __builtin_memcpy(full, p, count);
    return load_int8(full);
  }
  BITVLA_INLINE F16 set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  BITVLA_INLINE F16 from_int(const int32_t* p, int32_t offset) {
    const __m256i o = _mm256_set1_epi32(offset);
    const __m256i* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256(v), o)),
            _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256(v + 1), o))};
  }
};

BITVLA_INLINE void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
BITVLA_INLINE void store(float* p, F16 x, size_t count) {
  _mm256_maskstore_ps(p, F16::first(count, 0), x.lo);
  _mm256_maskstore_ps(p + 8, F16::first(count, 8), x.hi);
}
BITVLA_INLINE void store_codes(int8_t* p, F16 x) {
  const __m256i wide = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(wide, _MM_SHUFFLE(3, 1, 2, 0));
  const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
}

BITVLA_INLINE F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
BITVLA_INLINE F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
BITVLA_INLINE F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
BITVLA_INLINE F16 operator/(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
BITVLA_INLINE F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
BITVLA_INLINE F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
BITVLA_INLINE F16 abs(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
BITVLA_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
BITVLA_INLINE F16 round(F16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
BITVLA_INLINE __m256 power_of_two(__m256 a) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
BITVLA_INLINE F16 power_of_two(F16 a) { return {power_of_two(a.lo), power_of_two(a.hi)}; }
BITVLA_INLINE F16 if_greater(F16 a, F16 b, F16 x, F16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
BITVLA_INLINE float sum(F16 x) {
  const __m256 a = _mm256_add_ps(x.lo, x.hi);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
BITVLA_INLINE float maximum(F16 x) {
  const __m256 a = _mm256_max_ps(x.lo, x.hi);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

// A product of two pairs is at most 2 * 2 * 128 = 512 in size: 64 of them fit in 16 bits, for -512 * 64 is the least
// int16 and 508 * 64 is below the greatest.
constexpr size_t kSafe = 64;

BITVLA_INLINE __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

struct Dot {
  static constexpr size_t kTiles = 1;
  static constexpr size_t kTokens = 4;
  template <Packing kPacking>  // up to which unpacking anew for every four beats unpacking once
  static constexpr size_t kFewTokens = kPacking == Packing::kBase3 ? 4 : 8;
  static constexpr size_t kDepth = kSafe;  // steps of 4 columns unpacked at a time

  BITVLA_INLINE __m256i activations(const int8_t* codes) {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof four);
    return _mm256_set1_epi32(four);
  }

  // The codes of half a block, step by step.
  template <Packing kPacking>
  BITVLA_INLINE void codes_of(const uint8_t* half_block, __m256i (&w)[block_steps(kPacking)]) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half_block));
    if constexpr (kPacking == Packing::kBase3) {
      // Bytes less 128, which are multiplied by 3 just so; there are only signed comparisons, and they give 0 or -1.
      v = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
#pragma GCC unroll 5
      for (int p = 0; p < 5; ++p) {
        const __m256i not_0 = _mm256_cmpgt_epi8(v, _mm256_set1_epi8(85 - 128));
        const __m256i is_2 = _mm256_cmpgt_epi8(v, _mm256_set1_epi8(170 - 128));
        w[p] = _mm256_abs_epi8(_mm256_add_epi8(not_0, is_2));
        v = _mm256_add_epi8(v, _mm256_add_epi8(v, v));
      }
    } else {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        w[p] = _mm256_and_si256(v, _mm256_set1_epi8(3));
        v = _mm256_srli_epi16(v, 2);
      }
    }
  }

  // [step][64]
  template <Packing kPacking>
  static void unpack(const uint8_t* packed, size_t, size_t, size_t blocks, uint8_t* out) {
    constexpr int kSteps = block_steps(kPacking);
    for (size_t b = 0; b < blocks; ++b) {
      for (size_t half = 0; half < 2; ++half) {
        __m256i w[kSteps];
        codes_of<kPacking>(packed + b * kBlockBytes + half * 32, w);
        __m256i* to = reinterpret_cast<__m256i*>(out + b * kSteps * kBlockBytes + half * 32);
#pragma GCC unroll 5
        for (int p = 0; p < kSteps; ++p) _mm256_store_si256(to + 2 * p, w[p]);
      }
    }
  }

  template <int kT, int kM>
  BITVLA_APART void multiply(const uint8_t* weights, const int8_t* codes, size_t stride, size_t steps, int32_t* acc,
                       bool first) {
    static_assert(kT == 1);
    __m256i c[kM][2];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) c[m][0] = c[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (size_t s = 0; s < steps; ++s) {
      const __m256i* w = reinterpret_cast<const __m256i*>(weights + s * kBlockBytes);
      const __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const __m256i a = activations(codes + m * stride + s * 4);
        c[m][0] = _mm256_add_epi16(c[m][0], _mm256_maddubs_epi16(w0, a));
        c[m][1] = _mm256_add_epi16(c[m][1], _mm256_maddubs_epi16(w1, a));
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      for (int half = 0; half < 2; ++half) {
        __m256i* to = reinterpret_cast<__m256i*>(acc + m * kStripeRows + half * 8);
        const __m256i before = first ? _mm256_setzero_si256() : _mm256_load_si256(to);
        _mm256_store_si256(to, _mm256_add_epi32(before, widen(c[m][half])));
      }
    }
  }

  template <Packing kPacking, int kM>
  BITVLA_APART void vector(const uint8_t* packed, const int8_t* codes, size_t stride, size_t blocks, int32_t* acc) {
    constexpr int kSteps = block_steps(kPacking);
    constexpr size_t kSafeBlocks = kSafe / kSteps;
    for (int half = 0; half < 2; ++half) {
      __m256i total[kM];
      for (int m = 0; m < kM; ++m) total[m] = _mm256_setzero_si256();
      for (size_t b0 = 0; b0 < blocks; b0 += kSafeBlocks) {
        __m256i c[kM];
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) c[m] = _mm256_setzero_si256();
        for (size_t b = b0; b < smaller(b0 + kSafeBlocks, blocks); ++b) {
          if (half == 0) prefetch(packed + b * kBlockBytes);
          __m256i w[kSteps];
          codes_of<kPacking>(packed + b * kBlockBytes + half * 32, w);
#pragma GCC unroll 4
          for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 5
            for (int p = 0; p < kSteps; ++p) {
              const __m256i a = activations(codes + m * stride + (b * kSteps + p) * 4);
              c[m] = _mm256_add_epi16(c[m], _mm256_maddubs_epi16(w[p], a));
            }
          }
        }
        for (int m = 0; m < kM; ++m) total[m] = _mm256_add_epi32(total[m], widen(c[m]));
      }
      for (int m = 0; m < kM; ++m) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(acc + m * kTile + half * 8), total[m]);
      }
    }
  }
};

uint64_t dot_peak(uint64_t iterations) {
  constexpr int kSums = 10;
  __m256i c[kSums], product;
  const __m256i w = _mm256_set1_epi8(1), a = _mm256_set1_epi8(-3);
#pragma GCC unroll 10
  for (int i = 0; i < kSums; ++i) c[i] = _mm256_setzero_si256();
  for (uint64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; ++i) {
      asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(c[i]), "=&x"(product) : "x"(w), "x"(a));
    }
  }
  return iterations * kSums * 32;
}

}  // namespace

const Kernels kAvx2 = {"avx2",         rows<F16>,      ternary<F16, Dot>, linear<F16>, rope<F16>,
                       attention_pack, attention<F16>, dot_peak};

}  // namespace bitvla
