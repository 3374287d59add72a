// NEON with the dot product extension: four registers hold 16 floats, or a 4-way dot product for 16 rows.
#include <arm_neon.h>

#include "ternary.h"

namespace bitvla {
namespace {

struct F16 {
  float32x4_t v[4];

  static constexpr int kLinearTokens = 2, kLinearRows = 2;
  static constexpr int kPanelRows = 6, kPanelVectors = 1;

  BITVLA_INLINE F16 load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  BITVLA_INLINE F16 load(const float* p, size_t count) {
    float full[kLanes] = {};
    for (size_t i = 0; i < count; ++i) full[i] = p[i];
    return load(full);
  }
  BITVLA_INLINE float32x4_t widen(const uint16_t* bf16) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(bf16), 16));
  }
  BITVLA_INLINE F16 load_bf16(const uint16_t* p) { return {{widen(p), widen(p + 4), widen(p + 8), widen(p + 12)}}; }
  BITVLA_INLINE F16 load_bf16(const uint16_t* p, size_t count) {
    uint16_t full[kLanes] = {};
    for (size_t i = 0; i < count; ++i) full[i] = p[i];
    return load_bf16(full);
  }
  BITVLA_INLINE F16 load_int8(const int8_t* p) {
    const int8x16_t v = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
  }
  BITVLA_INLINE F16 load_int8(const int8_t* p, size_t count) {
    int8_t full[kLanes] = {};
    for (size_t i = 0; i < count; ++i) full[i] = p[i];
    return load_int8(full);
  }
  BITVLA_INLINE F16 set(float value) {
    const float32x4_t x = vdupq_n_f32(value);
    return {{x, x, x, x}};
  }
  BITVLA_INLINE F16 from_int(const int32_t* p, int32_t offset) {
    F16 x;
    for (int i = 0; i < 4; ++i) x.v[i] = vcvtq_f32_s32(vsubq_s32(vld1q_s32(p + 4 * i), vdupq_n_s32(offset)));
    return x;
  }
};

template <class Op>
BITVLA_INLINE F16 quarters(F16 a, F16 b, Op op) {
  return {{op(a.v[0], b.v[0]), op(a.v[1], b.v[1]), op(a.v[2], b.v[2]), op(a.v[3], b.v[3])}};
}

BITVLA_INLINE void store(float* p, F16 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
BITVLA_INLINE void store(float* p, F16 x, size_t count) {
  float full[kLanes];
  store(full, x);
  for (size_t i = 0; i < count; ++i) p[i] = full[i];
}
BITVLA_INLINE void store_codes(int8_t* p, F16 x) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[0])), vqmovn_s32(vcvtnq_s32_f32(x.v[1])));
  const int16x8_t high = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[2])), vqmovn_s32(vcvtnq_s32_f32(x.v[3])));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

BITVLA_INLINE F16 operator+(F16 a, F16 b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); });
}
BITVLA_INLINE F16 operator-(F16 a, F16 b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vsubq_f32(x, y); });
}
BITVLA_INLINE F16 operator*(F16 a, F16 b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); });
}
BITVLA_INLINE F16 operator/(F16 a, F16 b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vdivq_f32(x, y); });
}
// By comparison: vmaxq and vminq treat NaN and the sign of zero unlike the other instruction sets.
BITVLA_INLINE F16 max(F16 a, F16 b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); });
}
BITVLA_INLINE F16 min(F16 a, F16 b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); });
}
BITVLA_INLINE F16 abs(F16 a) {
  return quarters(a, a, [](float32x4_t x, float32x4_t) { return vabsq_f32(x); });
}
BITVLA_INLINE F16 round(F16 a) {
  return quarters(a, a, [](float32x4_t x, float32x4_t) { return vrndnq_f32(x); });
}
BITVLA_INLINE F16 power_of_two(F16 a) {
  return quarters(a, a, [](float32x4_t x, float32x4_t) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(127)), 23));
  });
}
BITVLA_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {{vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]), vfmaq_f32(c.v[2], a.v[2], b.v[2]),
           vfmaq_f32(c.v[3], a.v[3], b.v[3])}};
}
BITVLA_INLINE F16 if_greater(F16 a, F16 b, F16 x, F16 y) {
  F16 z;
  for (int i = 0; i < 4; ++i) z.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]);
  return z;
}
BITVLA_INLINE float sum(F16 x) {
  const float32x4_t a = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}
BITVLA_INLINE float maximum(F16 x) {
  const auto greater = [](float a, float b) { return a > b ? a : b; };
  float v[kLanes];
  store(v, x);
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) v[i] = greater(v[i], v[i + half]);
  }
  return v[0];
}

// Four 4-way dot products: the columns 4 p .. 4 p + 3 of 4 rows by those of one token.
template <int p>
BITVLA_INLINE int32x4_t dot(int32x4_t sums, int8x16_t weights, int8x16_t codes) {
  return vdotq_laneq_s32(sums, weights, codes, p);
}

struct Dot {
  static constexpr size_t kTiles = 1;
  static constexpr size_t kTokens = 4;
  template <Packing>
  static constexpr size_t kFewTokens = 4;  // up to which unpacking anew for every four beats unpacking once
  static constexpr size_t kDepth = 128;    // steps of 4 columns unpacked at a time

  // The codes of a quarter of a block, step by step.
  template <Packing kPacking>
  BITVLA_INLINE void codes_of(const uint8_t* quarter, uint8x16_t (&w)[block_steps(kPacking)]) {
    constexpr int kSteps = block_steps(kPacking);
    uint8x16_t v = vld1q_u8(quarter);
#pragma GCC unroll 5
    for (int p = 0; p < kSteps; ++p) {
      if constexpr (kPacking == Packing::kBase3) {
        w[p] = vshrq_n_u8(vhaddq_u8(v, vshrq_n_u8(v, 1)), 6);  // 3 v / 256
        v = vmulq_u8(v, vdupq_n_u8(3));
      } else {
        w[p] = vandq_u8(v, vdupq_n_u8(3));
        v = vshrq_n_u8(v, 2);
      }
    }
  }

  // [step][64]
  template <Packing kPacking>
  static void unpack(const uint8_t* packed, size_t, size_t, size_t blocks, uint8_t* out) {
    constexpr size_t kSteps = block_steps(kPacking);
    for (size_t i = 0; i < blocks * kBlockBytes; i += 16) {
      uint8x16_t w[kSteps];
      codes_of<kPacking>(packed + i, w);
      uint8_t* to = out + i / kBlockBytes * kSteps * kBlockBytes + i % kBlockBytes;
      for (size_t p = 0; p < kSteps; ++p) vst1q_u8(to + p * kBlockBytes, w[p]);
    }
  }

  template <int p, int kM>
  BITVLA_INLINE void step(int32x4_t (&c)[kM][4], const int8x16_t (&a)[kM], const uint8_t* weights) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(weights + p * kBlockBytes + r * 16));
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) c[m][r] = dot<p>(c[m][r], w, a[m]);
    }
  }

  template <int kT, int kM>
  BITVLA_APART void multiply(const uint8_t* weights, const int8_t* codes, size_t stride, size_t steps, int32_t* acc,
                       bool first) {
    static_assert(kT == 1);
    int32x4_t c[kM][4];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) c[m][r] = first ? vdupq_n_s32(0) : vld1q_s32(acc + m * kStripeRows + r * 4);
    }
    for (size_t s = 0; s < steps; s += 4) {
      int8x16_t a[kM];
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) a[m] = vld1q_s8(codes + m * stride + s * 4);
      step<0>(c, a, weights + s * kBlockBytes);
      step<1>(c, a, weights + s * kBlockBytes);
      step<2>(c, a, weights + s * kBlockBytes);
      step<3>(c, a, weights + s * kBlockBytes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) vst1q_s32(acc + m * kStripeRows + r * 4, c[m][r]);
    }
  }

  template <Packing kPacking, int kM>
  BITVLA_APART void vector(const uint8_t* packed, const int8_t* codes, size_t stride, size_t blocks, int32_t* acc) {
    constexpr size_t kSteps = block_steps(kPacking);
    int32x4_t c[kM][4];
    for (int m = 0; m < kM; ++m) {
      for (int r = 0; r < 4; ++r) c[m][r] = vdupq_n_s32(0);
    }
    for (size_t b = 0; b < blocks; ++b) {
      int8x16_t a[kM], fifth[kM];
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
        const int8_t* from = codes + m * stride + b * 4 * kSteps;
        a[m] = vld1q_s8(from);
        if constexpr (kSteps == 5) {
          int32_t four;
          __builtin_memcpy(&four, from + 16, sizeof four);
          fifth[m] = vreinterpretq_s8_s32(vdupq_n_s32(four));
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        uint8x16_t u[kSteps];
        codes_of<kPacking>(packed + b * kBlockBytes + r * 16, u);
        int8x16_t w[kSteps];
        for (size_t p = 0; p < kSteps; ++p) w[p] = vreinterpretq_s8_u8(u[p]);
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) {
          c[m][r] = dot<3>(dot<2>(dot<1>(dot<0>(c[m][r], w[0], a[m]), w[1], a[m]), w[2], a[m]), w[3], a[m]);
          if constexpr (kSteps == 5) c[m][r] = dot<0>(c[m][r], w[4], fifth[m]);
        }
      }
    }
    for (int m = 0; m < kM; ++m) {
      for (int r = 0; r < 4; ++r) vst1q_s32(acc + m * kTile + r * 4, c[m][r]);
    }
  }
};

uint64_t dot_peak(uint64_t iterations) {
  constexpr int kSums = 16;
  int32x4_t c[kSums];
  const int8x16_t w = vdupq_n_s8(1), a = vdupq_n_s8(-3);
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) c[i] = vdupq_n_s32(0);
  for (uint64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(c[i]) : "w"(w), "w"(a));
  }
  return iterations * kSums * 16;
}

}  // namespace

const Kernels kNeon = {"neon",         rows<F16>,      ternary<F16, Dot>, linear<F16>, rope<F16>,
                       attention_pack, attention<F16>, dot_peak};

}  // namespace bitvla
