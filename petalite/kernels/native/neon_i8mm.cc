// NEON's products of 2 × 8 by 8 × 2 bytes (ARMv8.6: Graviton 3, Apple M2, Cortex-X2 and later), half as many as dot
// products for several tokens in int8 and nf4. All else is neon.cc's.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>

#include "digits.h"
#include "kernels.h"
#include "target.h"
#include "tile.h"

#if defined(__clang__)
PETALITE_TARGET_BEGIN("dotprod,i8mm")
#else
PETALITE_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")
#endif

namespace petalite {
namespace {

constexpr int kQuarters = 4;  // vectors of 4 rows that make a panel

inline void prefetch(const uint8_t* at) { __builtin_prefetch(at + 1024); }
inline int8x16_t every(int32_t word) { return vreinterpretq_s8_s32(vdupq_n_s32(word)); }
inline int8x16_t codes_at(const uint8_t* at) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at), vdupq_n_u8(0x80))); }

// Two rows' eight values each, of four rows in two steps of four inputs.
inline int8x16_t upper(int8x16_t first, int8x16_t second) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second)));
}
inline int8x16_t lower(int8x16_t first, int8x16_t second) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second)));
}

// Two columns of eight inputs' digits: those of the words first[0] and second[0], and of first[1] and second[1].
inline int8x16_t digits_at(const int32_t* first, const int32_t* second) {
    const int32x2_t a = vld1_s32(first), b = vld1_s32(second);
    return vreinterpretq_s8_s32(vcombine_s32(vzip1_s32(a, b), vzip2_s32(a, b)));
}

// Sums of four rows with N times two columns of digits: of two rows in each, both columns of the first, then of the
// second.
template <int N>
struct Sums {
    int32x4_t pairs[2][N];

    Sums() {
        for (int n = 0; n < N; ++n) pairs[0][n] = pairs[1][n] = vdupq_n_s32(0);
    }
    void add(int8x16_t first, int8x16_t second, const int8x16_t* digits) {
        const int8x16_t rows[2] = {upper(first, second), lower(first, second)};
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < 2; ++i) pairs[i][n] = vmmlaq_s32(pairs[i][n], rows[i], digits[n]);
    }
    int32x4_t first(int n) const { return vuzp1q_s32(pairs[0][n], pairs[1][n]); }
    int32x4_t second(int n) const { return vuzp2q_s32(pairs[0][n], pairs[1][n]); }
};

// What codes at `at` stand for, of eight inputs: two steps.
template <Format F>
inline void values_at(const uint8_t* at, int step_bytes, int8x16_t* values) {
    if constexpr (F == Format::INT8) {
        values[0] = codes_at(at), values[1] = codes_at(at + step_bytes);
    } else {
        const int8x16_t levels = vld1q_s8(kNf4Levels);
        const uint8x16_t both = vld1q_u8(at);
        values[0] = vqtbl1q_s8(levels, vandq_u8(both, vdupq_n_u8(15)));
        values[1] = vqtbl1q_s8(levels, vshrq_n_u8(both, 4));
    }
}

// A quarter's factor of a block: of nf4 with the rows' scales, which are at `at`.
template <Format F>
inline float32x4_t unit_at(const uint8_t* at, float factor) {
    if constexpr (F == Format::INT8) return vdupq_n_f32(factor);
    else return vmulq_n_f32(vreinterpretq_f32_u8(vld1q_u8(at)), factor);
}

// What the outlier columns, which are few, add to a quarter of a panel. Where the others begin.
template <Format F, int T>
inline const uint8_t* outliers(const DigitTile& tile, int from, const uint8_t* weight, float32x4_t* total) {
    for (int t = 0; t < T; ++t) total[t] = vdupq_n_f32(0);
    for (int codes = 0; codes < (F == Format::NF4 ? 2 : 1); ++codes) {
        for (int64_t b = 0; b < tile.fine_blocks(); ++b) {
            int32x4_t high[T], low[T];
            for (int t = 0; t < T; ++t) high[t] = low[t] = vdupq_n_s32(0);
            const int32_t* words = tile.fine(b) + from * 2;
            for (int k = 0; k < tile.fine_steps(b); k += F == Format::NF4 ? 2 : 1) {
                int8x16_t values[2];
                if constexpr (F == Format::NF4) values_at<F>(weight, 0, values);
                else values[0] = codes_at(weight);
                for (int i = 0; i < (F == Format::NF4 ? 2 : 1); ++i, words += tile.n_tokens * 2) {
                    for (int t = 0; t < T; ++t) {
                        const int8x16_t of_high = every(words[t * 2]);
                        high[t] = vdotq_s32(high[t], values[i], of_high);
                        low[t] = vdotq_s32(low[t], values[i], every(words[t * 2 + 1]));
                        if constexpr (F == Format::INT8) low[t] = vdotq_s32(low[t], codes_at(weight + 64), of_high);
                    }
                }
                weight += F == Format::NF4 ? 64 : 128;
            }
            for (int t = 0; t < T; ++t)
                total[t] = vfmaq_f32(total[t], vcvtq_f32_s32(vmlaq_n_s32(low[t], high[t], 254)),
                                     unit_at<F>(weight, tile.fine_factor(b)[from + t]));
            if (F == Format::NF4) weight += 64;
        }
    }
    return weight;
}

// Two tokens are the columns of one product. Of the last by itself the other column is of whatever words come next in
// the tile, where a block's starts and factors follow its digits; its sums go nowhere.
template <Format F, int T>
void digits_panel(const Linear& linear, const void* memory, int n_tokens, int from, int64_t panel, float* sums) {
    constexpr int kPairs = (T + 1) / 2, kBytes = F == Format::INT8 ? 128 : 64;  // of eight inputs
    const DigitTile tile(linear, memory, n_tokens);
    const uint8_t *first = linear.weight + panel * panel_bytes(linear), *weight = first;
    float32x4_t total[kQuarters][T];
    for (int q = 0; q < kQuarters; ++q) weight = outliers<F, T>(tile, from, first + q * 16, total[q]) - q * 16;
    for (int64_t b = 0; b < tile.blocks(); ++b) {
        Sums<kPairs> all[kQuarters];
        const int32_t* words = tile.block(b) + from;
        int8x16_t digits[kPairs], values[2];
        int k = 0;
        for (; k + 1 < tile.steps(b); k += 2, weight += kBytes, words += n_tokens * 2) {
            prefetch(weight), prefetch(weight + kBytes - 64);
            for (int p = 0; p < kPairs; ++p) digits[p] = digits_at(words + p * 2, words + n_tokens + p * 2);
            for (int q = 0; q < kQuarters; ++q) {
                values_at<F>(weight + q * 16, 64, values);
                all[q].add(values[0], values[1], digits);
            }
        }
        if (k < tile.steps(b)) {  // int8's last of all, one more step of four inputs, and none to go with it
            const int32_t none[2] = {0, 0};
            for (int p = 0; p < kPairs; ++p) digits[p] = digits_at(words + p * 2, none);
            for (int q = 0; q < kQuarters; ++q) all[q].add(codes_at(weight + q * 16), vdupq_n_s8(0), digits);
        }
        for (int q = 0; q < kQuarters; ++q) {
            for (int t = 0; t < T; ++t) {
                const int32x4_t whole = t % 2 ? all[q].second(t / 2) : all[q].first(t / 2);
                const float32x4_t unit = unit_at<F>(weight + q * 16, tile.factor(b)[from + t]);
                total[q][t] = vfmaq_f32(total[q][t], vcvtq_f32_s32(whole), unit);
            }
        }
        if (F == Format::NF4) weight += 64;
    }
    for (int q = 0; q < kQuarters; ++q) {
        const float32x4_t scale =
            F == Format::INT8 ? vld1q_f32(linear.scale + panel * kPanelRows + q * 4) : vdupq_n_f32(kNf4Unit);
        for (int t = 0; t < T; ++t) vst1q_f32(sums + (from + t) * kPanelRows + q * 4, vmulq_f32(total[q][t], scale));
    }
}

size_t tile_bytes(const Linear& linear, int n_tokens) { return neon_kernels.tile_bytes(linear, n_tokens); }

void prepare(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* tile) {
    neon_kernels.prepare(linear, x, x_stride, n_tokens, tile);
}

// Of up to as many tokens as have sums of 16 rows that fill half of the 32 registers.
using Panel = void (*)(const Linear&, const void* tile, int n_tokens, int from, int64_t panel, float* sums);
constexpr int kMost = 4;
template <Format F>
constexpr Panel kPanels[kMost] = {digits_panel<F, 1>, digits_panel<F, 2>, digits_panel<F, 3>, digits_panel<F, 4>};

void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool once,
              float* sums) {
    if (n_tokens == 1 || !has_digits(linear.format))
        return neon_kernels.multiply(linear, tile, n_tokens, first, n_panels, once, sums);
    const Panel* panels = linear.format == Format::INT8 ? kPanels<Format::INT8> : kPanels<Format::NF4>;
    for (int64_t panel = first; panel < first + n_panels; ++panel, sums += n_tokens * kPanelRows) {
        for (int from = 0; from < n_tokens; from += kMost)
            panels[std::min(n_tokens - from, kMost) - 1](linear, tile, n_tokens, from, panel, sums);
    }
}

void gate(const float* gates, const float* ups, float* out) { neon_kernels.gate(gates, ups, out); }

}  // namespace

const Kernels i8mm_kernels = {"neon-i8mm", tile_bytes, prepare, multiply, gate, false};

}  // namespace petalite

PETALITE_TARGET_END
#endif
