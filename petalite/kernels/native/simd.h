// Sixteen floats at a time on any machine, with the same bits on all of them.
//
// Every operation here is one IEEE operation per lane (fused multiply-add included), and sums over lanes go
// by one fixed tree, so what is built of them rounds alike with AVX512, AVX2, NEON and without. Included
// once per instruction set (PETALITE_SIMD_AVX512, _AVX2, _NEON or none), each in a namespace of its own
// (PETALITE_ISA): no function may be shared between files that are compiled for different machines. Must be
// compiled without contraction of a * b + c.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(PETALITE_SIMD_AVX512) || defined(PETALITE_SIMD_AVX2)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own immintrin.h
#endif
#include <immintrin.h>
#elif defined(PETALITE_SIMD_NEON)
#include <arm_neon.h>
#endif

namespace PETALITE_ISA {

constexpr int LANES = 16;

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bf16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even; every NaN becomes one
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return from_bits(sign | ((magnitude << 13) + 0x38000000u));
    const float small = float(magnitude) * 0x1p-24f;
    return sign ? -small : small;
}

inline uint16_t to_f16(float value) {  // to the nearest, ties to even
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to beyond the largest
    if (magnitude < 0x38800000u) {                                 // subnormal: the addition rounds
        return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1);
    return uint16_t(sign | (magnitude - 0x38000000u) >> 13);
}

#if defined(PETALITE_SIMD_AVX512)

struct V {
    __m512 v;
};
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline V splat(float x) { return {_mm512_set1_ps(x)}; }
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V zero_below(V value, V x, V limit) {  // value where not x < limit
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), value.v)};
}
inline V power_of_two(V shifted) {  // 2^n, n in the low bits of the float
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000)))};
}
inline V load_bf16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline V load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void transpose(V* rows) {  // 16 × 16, in place
    __m512 a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < LANES; i += 4) {  // then b[i + j] holds column 4q + j of rows i to i + 3 in its quarter q
        for (int j = 0; j < 2; j++) {
            const __m512d even = _mm512_castps_pd(a[i + j]), odd = _mm512_castps_pd(a[i + j + 2]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
        }
    }
    for (int j = 0; j < 4; j++) {
        const __m512 low = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88);  // columns j and 8 + j
        const __m512 high = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);  // 4 + j and 12 + j
        const __m512 more_low = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
        const __m512 more_high = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
        rows[j].v = _mm512_shuffle_f32x4(low, more_low, 0x88);
        rows[j + 8].v = _mm512_shuffle_f32x4(low, more_low, 0xdd);
        rows[j + 4].v = _mm512_shuffle_f32x4(high, more_high, 0x88);
        rows[j + 12].v = _mm512_shuffle_f32x4(high, more_high, 0xdd);
    }
}

#elif defined(PETALITE_SIMD_AVX2)

struct V {
    __m256 lo, hi;
};
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline V splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V fma(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline V zero_below(V value, V x, V limit) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ), value.lo),
            _mm256_and_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ), value.hi)};
}
inline __m256 power_of_two(__m256 shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000)));
}
inline V power_of_two(V shifted) { return {power_of_two(shifted.lo), power_of_two(shifted.hi)}; }
inline __m256 widened_bf16(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline V load_bf16(const uint16_t* p) { return {widened_bf16(p), widened_bf16(p + 8)}; }
inline V load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}

inline void transpose_8(__m256* rows) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    }
    for (int j = 0; j < 4; j++) {
        rows[j] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
        rows[j + 4] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
    }
}
inline void transpose(V* rows) {  // 16 × 16, in place
    __m256 quarters[2][2][8];     // [rows][columns]
    for (int i = 0; i < LANES; i++) {
        quarters[i / 8][0][i % 8] = rows[i].lo;
        quarters[i / 8][1][i % 8] = rows[i].hi;
    }
    for (int i = 0; i < 4; i++) transpose_8(quarters[i / 2][i % 2]);
    for (int i = 0; i < LANES; i++) rows[i] = {quarters[0][i / 8][i % 8], quarters[1][i / 8][i % 8]};
}

#else  // four vectors of NEON, or sixteen scalars

#if defined(PETALITE_SIMD_NEON)
typedef float32x4_t Part;
constexpr int PARTS = 4;
inline Part load_part(const float* p) { return vld1q_f32(p); }
inline void store_part(float* p, Part a) { vst1q_f32(p, a); }
inline Part splat_part(float x) { return vdupq_n_f32(x); }
inline Part add_part(Part a, Part b) { return vaddq_f32(a, b); }
inline Part sub_part(Part a, Part b) { return vsubq_f32(a, b); }
inline Part mul_part(Part a, Part b) { return vmulq_f32(a, b); }
inline Part div_part(Part a, Part b) { return vdivq_f32(a, b); }
inline Part fma_part(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }
inline Part max_part(Part a, Part b) { return vmaxq_f32(a, b); }
inline Part min_part(Part a, Part b) { return vminq_f32(a, b); }
inline Part zero_below_part(Part value, Part x, Part limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vcltq_f32(x, limit)));
}
inline Part power_of_two_part(Part shifted) {
    const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23);
    return vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(0x3f800000)));
}
inline Part bf16_part(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline Part f16_part(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
#else
typedef float Part;
constexpr int PARTS = 16;
inline Part load_part(const float* p) { return *p; }
inline void store_part(float* p, Part a) { *p = a; }
inline Part splat_part(float x) { return x; }
inline Part add_part(Part a, Part b) { return a + b; }
inline Part sub_part(Part a, Part b) { return a - b; }
inline Part mul_part(Part a, Part b) { return a * b; }
inline Part div_part(Part a, Part b) { return a / b; }
inline Part fma_part(Part a, Part b, Part c) { return fmaf(a, b, c); }
inline Part max_part(Part a, Part b) { return a > b ? a : b; }
inline Part min_part(Part a, Part b) { return a < b ? a : b; }
inline Part zero_below_part(Part value, Part x, Part limit) { return x < limit ? 0.0f : value; }
inline Part power_of_two_part(Part shifted) { return from_bits((to_bits(shifted) << 23) + 0x3f800000u); }
inline Part bf16_part(const uint16_t* p) { return from_bf16(*p); }
inline Part f16_part(const uint16_t* p) { return from_f16(*p); }
#endif

struct V {
    Part part[PARTS];
};
#define PETALITE_EACH(expression)               \
    V result;                                   \
    for (int i = 0; i < PARTS; i++) result.part[i] = (expression); \
    return result
constexpr int PART = LANES / PARTS;
inline V load(const float* p) { PETALITE_EACH(load_part(p + i * PART)); }
inline void store(float* p, V a) {
    for (int i = 0; i < PARTS; i++) store_part(p + i * PART, a.part[i]);
}
inline V splat(float x) { PETALITE_EACH(splat_part(x)); }
inline V add(V a, V b) { PETALITE_EACH(add_part(a.part[i], b.part[i])); }
inline V sub(V a, V b) { PETALITE_EACH(sub_part(a.part[i], b.part[i])); }
inline V mul(V a, V b) { PETALITE_EACH(mul_part(a.part[i], b.part[i])); }
inline V div(V a, V b) { PETALITE_EACH(div_part(a.part[i], b.part[i])); }
inline V fma(V a, V b, V c) { PETALITE_EACH(fma_part(a.part[i], b.part[i], c.part[i])); }
inline V max(V a, V b) { PETALITE_EACH(max_part(a.part[i], b.part[i])); }
inline V min(V a, V b) { PETALITE_EACH(min_part(a.part[i], b.part[i])); }
inline V zero_below(V value, V x, V limit) {
    PETALITE_EACH(zero_below_part(value.part[i], x.part[i], limit.part[i]));
}
inline V power_of_two(V shifted) { PETALITE_EACH(power_of_two_part(shifted.part[i])); }
inline V load_bf16(const uint16_t* p) { PETALITE_EACH(bf16_part(p + i * PART)); }
inline V load_f16(const uint16_t* p) { PETALITE_EACH(f16_part(p + i * PART)); }
#undef PETALITE_EACH
inline void transpose(V* rows) {  // 16 × 16, in place
    float all[LANES][LANES];
    for (int i = 0; i < LANES; i++) store(all[i], rows[i]);
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < i; j++) {
            const float kept = all[i][j];
            all[i][j] = all[j][i];
            all[j][i] = kept;
        }
    }
    for (int i = 0; i < LANES; i++) rows[i] = load(all[i]);
}

#endif

inline V load_first(const float* p, int count) {  // zeros behind them
    float padded[LANES] = {};
    for (int i = 0; i < count; i++) padded[i] = p[i];
    return load(padded);
}

inline void store_first(float* p, V a, int count) {
    float all[LANES];
    store(all, a);
    for (int i = 0; i < count; i++) p[i] = all[i];
}

inline float sum_lanes(V a) {
    float x[LANES];
    store(x, a);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    }
    return x[0];
}

inline float max_lanes(V a) {
    float x[LANES];
    store(x, a);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) x[i] = x[i] < x[i + width] ? x[i + width] : x[i];
    }
    return x[0];
}

// e^x within 2 units in the last place: 0 below -87.3, no more than e^88.3; NaN stays NaN. The polynomial is
// that of the Cephes library (S. L. Moshier).
inline V exponential(V x) {
    const V lowest = splat(-87.3f), magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to whole
    const V clamped = min(splat(88.3f), max(lowest, x));
    const V shifted = fma(clamped, splat(1.44269504f), magic);
    const V n = sub(shifted, magic);
    V r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    V p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), splat(1.0f));
    return zero_below(mul(p, power_of_two(shifted)), x, lowest);
}

inline float exponential(float x) {
    float all[LANES];
    store(all, exponential(splat(x)));
    return all[0];
}

}  // namespace PETALITE_ISA
