// AVX-512 with VNNI: one register holds 16 floats, or a 4-way dot product for 16 rows.
#include <immintrin.h>

#include "ternary.h"

namespace bitvla {
namespace {

struct F16 {
  __m512 v;

  static constexpr int kLinearTokens = 4, kLinearRows = 6;
  static constexpr int kPanelRows = 12, kPanelVectors = 2;

  BITVLA_INLINE __mmask16 first(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }

  BITVLA_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  BITVLA_INLINE F16 load(const float* p, size_t count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
  BITVLA_INLINE F16 widen(__m256i bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16))};
  }
  BITVLA_INLINE F16 load_bf16(const uint16_t* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  BITVLA_INLINE F16 load_bf16(const uint16_t* p, size_t count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), p));
  }
  BITVLA_INLINE F16 widen(__m128i codes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))}; }
  BITVLA_INLINE F16 load_int8(const int8_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  BITVLA_INLINE F16 load_int8(const int8_t* p, size_t count) {
    return widen(_mm_maskz_loadu_epi8(first(count), p));
  }
  BITVLA_INLINE F16 set(float value) { return {_mm512_set1_ps(value)}; }
  BITVLA_INLINE F16 from_int(const int32_t* p, int32_t offset) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(offset)))};
  }
};

BITVLA_INLINE void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
BITVLA_INLINE void store(float* p, F16 x, size_t count) { _mm512_mask_storeu_ps(p, F16::first(count), x.v); }
BITVLA_INLINE void store_codes(int8_t* p, F16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

BITVLA_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
BITVLA_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BITVLA_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BITVLA_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
BITVLA_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
BITVLA_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
BITVLA_INLINE F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
BITVLA_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BITVLA_INLINE F16 round(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
BITVLA_INLINE F16 power_of_two(F16 a) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
BITVLA_INLINE F16 if_greater(F16 a, F16 b, F16 x, F16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
BITVLA_INLINE float sum(F16 x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
BITVLA_INLINE float maximum(F16 x) {
  const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

struct Dot {
  static constexpr size_t kTiles = 4;   // row tiles, times
  static constexpr size_t kTokens = 6;  // tokens: 24 sums in registers
  template <Packing kPacking>  // up to which unpacking anew for every four beats unpacking once
  static constexpr size_t kFewTokens = kPacking == Packing::kBase3 ? 4 : 24;
  static constexpr size_t kDepth = 96;  // steps of 4 columns unpacked at a time

  BITVLA_INLINE __m512i activations(const int8_t* codes) {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
  }

  BITVLA_INLINE __m512i triple(__m512i v) { return _mm512_add_epi8(v, _mm512_add_epi8(v, v)); }

  // 3 v / 256, byte by byte.
  BITVLA_INLINE __m512i digit(__m512i v) {
    const __mmask64 not_0 = _mm512_cmpgt_epu8_mask(v, _mm512_set1_epi8(85));
    const __mmask64 is_2 = _mm512_cmpgt_epu8_mask(v, _mm512_set1_epi8(static_cast<char>(170)));
    return _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(not_0, _mm512_set1_epi8(1)), is_2, _mm512_set1_epi8(2));
  }

  // [step][tile][64]
  template <Packing kPacking>
  static void unpack(const uint8_t* packed, size_t tile_bytes, size_t row_tiles, size_t blocks, uint8_t* out) {
    constexpr int kSteps = block_steps(kPacking);
    const size_t step = row_tiles * kBlockBytes;
    for (size_t t = 0; t < row_tiles; ++t) {
      for (size_t b = 0; b < blocks; ++b) {
        __m512i v = _mm512_loadu_si512(packed + t * tile_bytes + b * kBlockBytes);
        uint8_t* to = out + (b * kSteps * row_tiles + t) * kBlockBytes;
#pragma GCC unroll 5
        for (int p = 0; p < kSteps; ++p) {
          const bool base3 = kPacking == Packing::kBase3;
          _mm512_store_si512(to + p * step, base3 ? digit(v) : _mm512_and_si512(v, _mm512_set1_epi8(3)));
          v = base3 ? triple(v) : _mm512_srli_epi16(v, 2);
        }
      }
    }
  }

  template <int kT, int kM>
  BITVLA_APART void multiply(const uint8_t* weights, const int8_t* codes, size_t stride, size_t steps, int32_t* acc,
                       bool first) {
    __m512i c[kM][kT];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) {
        c[m][t] = first ? _mm512_setzero_si512() : _mm512_load_si512(acc + m * kStripeRows + t * kTile);
      }
    }
#pragma GCC unroll 4
    for (size_t s = 0; s < steps; ++s) {
      __m512i w[kT];
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) w[t] = _mm512_load_si512(weights + (s * kT + t) * kBlockBytes);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const __m512i a = activations(codes + m * stride + s * 4);
#pragma GCC unroll 4
        for (int t = 0; t < kT; ++t) c[m][t] = _mm512_dpbusd_epi32(c[m][t], w[t], a);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) _mm512_store_si512(acc + m * kStripeRows + t * kTile, c[m][t]);
    }
  }

  template <Packing kPacking, int kM>
  BITVLA_INLINE void vector(const uint8_t* packed, const int8_t* codes, size_t stride, size_t blocks, int32_t* acc) {
    (kPacking == Packing::kBase3 ? vector_base3<kM> : vector_2bit<kM>)(packed, codes, stride, blocks, acc);
  }

  // Codes stay where they are in their bytes: sums come out 1, 4, 16 and 64 times too large and are shifted at the end.
  template <int kM>
  BITVLA_APART void vector_2bit(const uint8_t* packed, const int8_t* codes, size_t stride, size_t blocks,
                                int32_t* acc) {
    __m512i c[kM][4];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) c[m][p] = _mm512_setzero_si512();
    }
    for (size_t b = 0; b < blocks; ++b) {
      prefetch(packed + b * kBlockBytes);
      const __m512i v = _mm512_loadu_si512(packed + b * kBlockBytes);
      __m512i w[4];
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) w[p] = _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(3 << (2 * p))));
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          c[m][p] = _mm512_dpbusd_epi32(c[m][p], w[p], activations(codes + m * stride + b * kTile + p * 4));
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
      const __m512i low = _mm512_add_epi32(c[m][0], _mm512_srai_epi32(c[m][1], 2));
      const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(c[m][2], 4), _mm512_srai_epi32(c[m][3], 6));
      _mm512_store_si512(acc + m * kTile, _mm512_add_epi32(low, high));
    }
  }

  // Codes are never taken out of their bytes: with 256 code_p = 3 x_p - x_(p+1), two dot products of whole bytes are
  // cheaper. Their sums may wrap around; 256 times the exact one must not, for up to kExact blocks.
  static constexpr size_t kExact = (1u << 23) / (2 * 128 * 20);

  template <int kM>
  BITVLA_APART void vector_base3(const uint8_t* packed, const int8_t* codes, size_t stride, size_t blocks,
                                 int32_t* acc) {
    constexpr int kChains = kM == 1 ? 5 : 2;  // of sums that wait for each other
    __m512i total[kM];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) total[m] = _mm512_setzero_si512();
    for (size_t b0 = 0; b0 < blocks; b0 += kExact) {
      __m512i now[kM][kChains], next[kM][kChains];  // sums over x_p and over x_(p+1)
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 5
        for (int i = 0; i < kChains; ++i) now[m][i] = next[m][i] = _mm512_setzero_si512();
      }
      for (size_t b = b0; b < smaller(b0 + kExact, blocks); ++b) {
        prefetch(packed + b * kBlockBytes);
        __m512i x = _mm512_loadu_si512(packed + b * kBlockBytes);
#pragma GCC unroll 5
        for (int p = 0; p < 5; ++p) {
          const __m512i y = triple(x);
#pragma GCC unroll 4
          for (int m = 0; m < kM; ++m) {
            const __m512i a = activations(codes + m * stride + b * 20 + p * 4);
            now[m][p % kChains] = _mm512_dpbusd_epi32(now[m][p % kChains], x, a);
            next[m][p % kChains] = _mm512_dpbusd_epi32(next[m][p % kChains], y, a);
          }
          x = y;
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 5
        for (int i = 1; i < kChains; ++i) {
          now[m][0] = _mm512_add_epi32(now[m][0], now[m][i]);
          next[m][0] = _mm512_add_epi32(next[m][0], next[m][i]);
        }
        const __m512i three = _mm512_add_epi32(now[m][0], _mm512_add_epi32(now[m][0], now[m][0]));
        total[m] = _mm512_add_epi32(total[m], _mm512_srai_epi32(_mm512_sub_epi32(three, next[m][0]), 8));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) _mm512_store_si512(acc + m * kTile, total[m]);
  }
};

uint64_t dot_peak(uint64_t iterations) {
  constexpr int kSums = 24;
  __m512i c[kSums];
  const __m512i w = _mm512_set1_epi8(1), a = _mm512_set1_epi8(-3);
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) c[i] = _mm512_setzero_si512();
  for (uint64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) asm volatile("vpdpbusd %2, %1, %0" : "+v"(c[i]) : "v"(w), "v"(a));
  }
  return iterations * kSums * 64;
}

}  // namespace

const Kernels kAvx512Vnni = {"avx512vnni", rows<F16>,      ternary<F16, Dot>, linear<F16>, rope<F16>,
                             attention_pack, attention<F16>, dot_peak};

}  // namespace bitvla
