// NEON with the dot product instructions (ARMv8.2: Graviton 2, Apple M1, Cortex-A76 and later).
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"
#include "prepare.h"
#include "short.h"
#include "target.h"

#if defined(__clang__)
PETALITE_TARGET_BEGIN("dotprod")
#else
PETALITE_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif

#define PETALITE_SIMD_NEON 1
#define PETALITE_ISA linear_neon
#include "simd.h"

namespace petalite {
namespace {

#include "gate.h"

constexpr int kQuarters = 4;  // vectors of 4 rows that make a panel

inline void prefetch(const uint8_t* at) { __builtin_prefetch(at + 1024); }

// -- digits --------------------------------------------------------------------------------------------------

struct Neon {
    static uint32_t largest(const float* x) {
        uint32x4_t largest = vdupq_n_u32(0);
        for (int i = 0; i < 64; i += 4)
            largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
        return vmaxvq_u32(largest);
    }

    // Codes are taken as they are, without 128 added: nothing asks for sums of digits.
    static int32_t one_digit(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        for (int i = 0; i < n_words; ++i) {
            const int16x4_t digits = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i * 4), inverse)));
            const int8x8_t twice = vmovn_s16(vcombine_s16(digits, digits));
            vst1_lane_s32(out + i * stride, vreinterpret_s32_s8(twice), 0);
        }
        return 0;
    }

    static DigitSums two_digits(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        for (int i = 0; i < n_words; ++i) {
            const float32x4_t scaled = vmulq_n_f32(vld1q_f32(x + i * 4), inverse), high = vrndnq_f32(scaled);
            const float32x4_t rest = vmulq_n_f32(vsubq_f32(scaled, high), kDigit);
            const int16x8_t both = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(high)), vmovn_s32(vcvtnq_s32_f32(rest)));
            vst1_s32(out + i * stride, vreinterpret_s32_s8(vmovn_s16(both)));
        }
        return {0, 0};
    }
};

// -- whole numbers -------------------------------------------------------------------------------------------

inline int8x16_t every(int32_t word) { return vreinterpretq_s8_s32(vdupq_n_s32(word)); }
inline int8x16_t codes_at(const uint8_t* at) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at), vdupq_n_u8(0x80))); }

// add(q, values, digits, where they are) for each quarter q and step of a block, which begins at `weight` and has `n_words`
// of digits a step. Where the next one begins.
template <Format F, typename Add>
inline const uint8_t* over_steps(const uint8_t* weight, int step_bytes, const int32_t* digits, const int32_t* end,
                                 int n_words, Add add) {
    const int8x16_t levels = vld1q_s8(kNf4Levels);
    while (digits < end) {
        prefetch(weight);
        for (int q = 0; q < kQuarters; ++q) {
            const uint8_t* at = weight + q * 16;
            if constexpr (F == Format::INT8) {
                add(q, codes_at(at), digits, at);
            } else {
                const uint8x16_t both = vld1q_u8(at);
                add(q, vqtbl1q_s8(levels, vandq_u8(both, vdupq_n_u8(15))), digits, at);
                add(q, vqtbl1q_s8(levels, vshrq_n_u8(both, 4)), digits + n_words, at);
            }
        }
        weight += F == Format::INT8 ? step_bytes : 64;
        digits += F == Format::INT8 ? n_words : 2 * n_words;
    }
    return weight;
}

// What a block's sums come to, and where the next one begins.
template <Format F, int T>
inline const uint8_t* add_block(const uint8_t* weight, const int32x4_t (*whole)[T], const float* factor,
                                float32x4_t (*total)[T]) {
    for (int q = 0; q < kQuarters; ++q) {
        for (int t = 0; t < T; ++t) {
            float32x4_t unit = vdupq_n_f32(factor[t]);
            if constexpr (F == Format::NF4) unit = vmulq_f32(vreinterpretq_f32_u8(vld1q_u8(weight + q * 16)), unit);
            total[q][t] = vfmaq_f32(total[q][t], vcvtq_f32_s32(whole[q][t]), unit);
        }
    }
    return F == Format::NF4 ? weight + 64 : weight;
}

// T tokens of the tile from `from` on, all 16 rows of a panel.
template <Format F, int T>
void digits_panel(const Linear& linear, const void* memory, int n_tokens, int from, int64_t panel, float* sums) {
    const DigitTile tile(linear, memory, n_tokens);
    const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
    float32x4_t total[kQuarters][T];
    for (int q = 0; q < kQuarters; ++q)
        for (int t = 0; t < T; ++t) total[q][t] = vdupq_n_f32(0);
    for (int codes = 0; codes < (F == Format::NF4 ? 2 : 1); ++codes) {
        for (int64_t b = 0; b < tile.fine_blocks(); ++b) {
            int32x4_t high[kQuarters][T], low[kQuarters][T];
            for (int q = 0; q < kQuarters; ++q)
                for (int t = 0; t < T; ++t) high[q][t] = low[q][t] = vdupq_n_s32(0);
            const auto add = [&](int q, int8x16_t values, const int32_t* digits, const uint8_t* at) {
                for (int t = 0; t < T; ++t) {
                    const int8x16_t of_high = every(digits[t * 2]);
                    high[q][t] = vdotq_s32(high[q][t], values, of_high);
                    low[q][t] = vdotq_s32(low[q][t], values, every(digits[t * 2 + 1]));
                    if constexpr (F == Format::INT8) low[q][t] = vdotq_s32(low[q][t], codes_at(at + 64), of_high);
                }
            };
            const int32_t* digits = tile.fine(b) + from * 2;
            weight = over_steps<F>(weight, 128, digits, tile.fine_start(b), n_tokens * 2, add);
            for (int q = 0; q < kQuarters; ++q)
                for (int t = 0; t < T; ++t) low[q][t] = vmlaq_n_s32(low[q][t], high[q][t], 254);
            weight = add_block<F, T>(weight, low, tile.fine_factor(b) + from, total);
        }
    }
    for (int64_t b = 0; b < tile.blocks(); ++b) {
        int32x4_t whole[kQuarters][T];
        for (int q = 0; q < kQuarters; ++q)
            for (int t = 0; t < T; ++t) whole[q][t] = vdupq_n_s32(0);
        const auto add = [&](int q, int8x16_t values, const int32_t* digits, const uint8_t*) {
            for (int t = 0; t < T; ++t) whole[q][t] = vdotq_s32(whole[q][t], values, every(digits[t]));
        };
        weight = over_steps<F>(weight, 64, tile.block(b) + from, tile.start(b), n_tokens, add);
        weight = add_block<F, T>(weight, whole, tile.factor(b) + from, total);
    }
    for (int q = 0; q < kQuarters; ++q) {
        const float32x4_t scale =
            F == Format::INT8 ? vld1q_f32(linear.scale + panel * kPanelRows + q * 4) : vdupq_n_f32(kNf4Unit);
        for (int t = 0; t < T; ++t) vst1q_f32(sums + (from + t) * kPanelRows + q * 4, vmulq_f32(total[q][t], scale));
    }
}

// -- floats --------------------------------------------------------------------------------------------------

void prepare_float(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    float* columns = static_cast<float*>(memory);
    for (int64_t k = 0; k < float_columns(linear); ++k)
        for (int t = 0; t < n_tokens; ++t) *columns++ = k < linear.n_in ? x[t * x_stride + k] : 0.0f;
}

// Inputs 2i and 2i + 1 of 4 rows.
struct Pair {
    float32x4_t even, odd;
};

template <Format F>
inline Pair load_pair(const uint8_t* weight, int64_t i, int q) {
    if constexpr (F == Format::F32) {
        return {vreinterpretq_f32_u8(vld1q_u8(weight + i * 128 + q * 16)),
                vreinterpretq_f32_u8(vld1q_u8(weight + i * 128 + 64 + q * 16))};
    } else if constexpr (F == Format::F16) {
        const uint8_t* at = weight + i * 64 + q * 8;
        return {vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))), vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at + 32)))};
    } else {
        const uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(weight + i * 64 + q * 16));
        return {vreinterpretq_f32_u32(vshlq_n_u32(both, 16)),
                vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)))};
    }
}

// Sums of the inputs at even places and of those at odd ones, added at the end: the same order for any T.
template <Format F, int T>
void float_panel(const Linear& linear, const void* tile, int n_tokens, int from, int64_t panel, float* sums) {
    const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
    float32x4_t even[kQuarters][T], odd[kQuarters][T];
    for (int q = 0; q < kQuarters; ++q)
        for (int t = 0; t < T; ++t) even[q][t] = odd[q][t] = vdupq_n_f32(0);
    const float* columns = static_cast<const float*>(tile) + from;
    // A float32 panel of an odd number of inputs ends in the middle of a pair.
    const int64_t n_pairs = F == Format::F32 ? linear.n_in / 2 : (int64_t(linear.n_in) + 1) / 2;
    for (int64_t i = 0; i < n_pairs; ++i, columns += n_tokens * 2) {
        prefetch(weight + i * (F == Format::F32 ? 128 : 64));
        for (int q = 0; q < kQuarters; ++q) {
            const Pair weights = load_pair<F>(weight, i, q);
            for (int t = 0; t < T; ++t) {
                even[q][t] = vfmaq_n_f32(even[q][t], weights.even, columns[t]);
                odd[q][t] = vfmaq_n_f32(odd[q][t], weights.odd, columns[n_tokens + t]);
            }
        }
    }
    for (int q = 0; q < kQuarters; ++q) {
        for (int t = 0; t < T; ++t) {
            if (F == Format::F32 && linear.n_in % 2) {
                const float32x4_t last = vreinterpretq_f32_u8(vld1q_u8(weight + n_pairs * 128 + q * 16));
                even[q][t] = vfmaq_n_f32(even[q][t], last, columns[t]);
            }
            vst1q_f32(sums + (from + t) * kPanelRows + q * 4, vaddq_f32(even[q][t], odd[q][t]));
        }
    }
}

// -- the table -----------------------------------------------------------------------------------------------

size_t tile_bytes(const Linear& linear, int n_tokens) {
    switch (linear.format) {
        case Format::INT8:
        case Format::NF4: return DigitTile::bytes(linear, n_tokens);
        default: return size_t(float_columns(linear)) * n_tokens * 4;
    }
}

void prepare(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* tile) {
    const auto run = has_digits(linear.format) ? prepare_digits<Neon> : prepare_float;
    run(linear, x, x_stride, n_tokens, tile);
}

template <int T>
void panel_of(const Linear& linear, const void* tile, int n_tokens, int from, int64_t panel, float* sums) {
    switch (linear.format) {
        case Format::F32: return float_panel<Format::F32, T>(linear, tile, n_tokens, from, panel, sums);
        case Format::BF16: return float_panel<Format::BF16, T>(linear, tile, n_tokens, from, panel, sums);
        case Format::F16: return float_panel<Format::F16, T>(linear, tile, n_tokens, from, panel, sums);
        case Format::INT8: return digits_panel<Format::INT8, T>(linear, tile, n_tokens, from, panel, sums);
        case Format::NF4: return digits_panel<Format::NF4, T>(linear, tile, n_tokens, from, panel, sums);
        case Format::BF12: return;  // `multiply_short`
    }
}

// Two tokens' sums of 16 rows fill half of the 32 registers.
void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool,
              float* sums) {
    if (linear.format == Format::BF12) return multiply_short(linear, tile, n_tokens, first, n_panels, sums, multiply);
    for (int64_t panel = first; panel < first + n_panels; ++panel, sums += n_tokens * kPanelRows) {
        for (int from = 0; from < n_tokens; from += 2)
            n_tokens - from == 1 ? panel_of<1>(linear, tile, n_tokens, from, panel, sums)
                                 : panel_of<2>(linear, tile, n_tokens, from, panel, sums);
    }
}

}  // namespace

const Kernels neon_kernels = {"neon", tile_bytes, prepare, multiply, gate_by, false};

}  // namespace petalite

PETALITE_TARGET_END
#endif
