// NEON's products of 2 × 8 by 8 × 2 bytes (ARMv8.6: Graviton 3, Apple M2, Cortex-X2 and later), half as many as dot
// products for int8 and nf4. All else is neon.cc's.
#if defined(__aarch64__)
#include <arm_neon.h>

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
inline int8x16_t codes_at(const uint8_t* at) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at), vdupq_n_u8(0x80))); }

// Two rows' eight values each, of four rows in two steps of four inputs.
inline int8x16_t upper(int8x16_t first, int8x16_t second) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second)));
}
inline int8x16_t lower(int8x16_t first, int8x16_t second) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second)));
}

// Eight inputs' high digits, then their low ones. `first` and `second`: a word of each digit.
inline int8x16_t digits_at(const int32_t* first, const int32_t* second) {
    const int32x2_t a = vld1_s32(first), b = vld1_s32(second);
    return vreinterpretq_s8_s32(vcombine_s32(vzip1_s32(a, b), vzip2_s32(a, b)));
}

// Sums of four rows with T tokens: of two rows in each, high and low of the first, then of the second.
template <int T>
struct Sums {
    int32x4_t pairs[2][T];

    Sums() {
        for (int t = 0; t < T; ++t) pairs[0][t] = pairs[1][t] = vdupq_n_s32(0);
    }
    void add(int8x16_t first, int8x16_t second, const int8x16_t* digits) {
        const int8x16_t rows[2] = {upper(first, second), lower(first, second)};
        for (int t = 0; t < T; ++t)
            for (int i = 0; i < 2; ++i) pairs[i][t] = vmmlaq_s32(pairs[i][t], rows[i], digits[t]);
    }
    int32x4_t high(int t) const { return vuzp1q_s32(pairs[0][t], pairs[1][t]); }
    int32x4_t low(int t) const { return vuzp2q_s32(pairs[0][t], pairs[1][t]); }
};

template <int T>
void int8_panel(const Linear& linear, const Int8Tile& tile, int n_tokens, int from, int64_t panel, float* sums) {
    const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
    Sums<T> all[kQuarters];
    const int32_t* words = tile.columns + from * 2;
    const int64_t stride = n_tokens * 2;
    int8x16_t digits[T];
    int64_t k = 0;
    for (; k + 1 < tile.n_columns; k += 2, weight += 128, words += stride * 2) {
        prefetch(weight), prefetch(weight + 64);
        for (int t = 0; t < T; ++t) digits[t] = digits_at(words + t * 2, words + stride + t * 2);
        for (int q = 0; q < kQuarters; ++q) all[q].add(codes_at(weight + q * 16), codes_at(weight + 64 + q * 16), digits);
    }
    if (k < tile.n_columns) {  // one more step of four inputs, and none to go with it
        const int32_t none[2] = {0, 0};
        for (int t = 0; t < T; ++t) digits[t] = digits_at(words + t * 2, none);
        for (int q = 0; q < kQuarters; ++q) all[q].add(codes_at(weight + q * 16), vdupq_n_s8(0), digits);
        weight += 64;
    }
    for (int q = 0; q < kQuarters; ++q) {
        const float32x4_t scale = vld1q_f32(linear.scale + panel * kPanelRows + q * 4);
        for (int t = 0; t < T; ++t) {
            int32x4_t low = all[q].low(t);
            for (int64_t c = 0; c < tile.n_fine; ++c) {
                const int32x4_t word = vdupq_n_s32(tile.fine[c * n_tokens + from + t]);
                low = vdotq_s32(low, codes_at(weight + c * 64 + q * 16), vreinterpretq_s8_s32(word));
            }
            const float32x4_t coarse = vmulq_f32(vcvtq_f32_s32(all[q].high(t)), scale);
            const float32x4_t exact = vmulq_f32(vcvtq_f32_s32(low), scale);
            const float32x4_t whole = vfmaq_f32(exact, coarse, vdupq_n_f32(kDigit));
            vst1q_f32(sums + (from + t) * kPanelRows + q * 4, vmulq_f32(whole, vdupq_n_f32(tile.step[from + t])));
        }
    }
}

template <int T>
void nf4_panel(const Linear& linear, const void* tile, int n_tokens, int from, int64_t panel, float* sums) {
    const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
    const int8x16_t levels = vld1q_s8(kNf4Levels);
    float32x4_t total[kQuarters][T];
    for (int q = 0; q < kQuarters; ++q)
        for (int t = 0; t < T; ++t) total[q][t] = vdupq_n_f32(0);
    const int32_t* block = static_cast<const int32_t*>(tile);
    for (int64_t b = 0; b < Nf4Tile::blocks(linear); ++b, weight += kNf4BlockBytes, block += Nf4Tile::kWords * n_tokens) {
        Sums<T> all[kQuarters];
        for (int k = 0; k < 16; k += 2) {
            prefetch(weight + k * 32);
            int8x16_t digits[T];
            for (int t = 0; t < T; ++t) {
                const int32_t* words = block + (k * n_tokens + from + t) * 2;
                digits[t] = digits_at(words, words + n_tokens * 2);
            }
            for (int q = 0; q < kQuarters; ++q) {
                const uint8x16_t both = vld1q_u8(weight + k * 32 + q * 16);
                all[q].add(vqtbl1q_s8(levels, vandq_u8(both, vdupq_n_u8(15))), vqtbl1q_s8(levels, vshrq_n_u8(both, 4)),
                           digits);
            }
        }
        const float* factor = reinterpret_cast<const float*>(block + 33 * n_tokens) + from;
        for (int q = 0; q < kQuarters; ++q) {
            const float32x4_t scale = vreinterpretq_f32_u8(vld1q_u8(weight + 512 + q * 16));
            for (int t = 0; t < T; ++t) {
                const int32x4_t whole = vmlaq_n_s32(all[q].low(t), all[q].high(t), 254);
                total[q][t] = vfmaq_f32(total[q][t], vcvtq_f32_s32(whole), vmulq_n_f32(scale, factor[t]));
            }
        }
    }
    for (int q = 0; q < kQuarters; ++q)
        for (int t = 0; t < T; ++t) vst1q_f32(sums + (from + t) * kPanelRows + q * 4, total[q][t]);
}

template <int T>
void panel_of(const Linear& linear, const void* tile, int n_tokens, int from, int64_t panel, float* sums) {
    if (linear.format == Format::NF4) return nf4_panel<T>(linear, tile, n_tokens, from, panel, sums);
    int8_panel<T>(linear, Int8Tile(linear, tile, n_tokens), n_tokens, from, panel, sums);
}

size_t tile_bytes(const Linear& linear, int n_tokens) { return neon_kernels.tile_bytes(linear, n_tokens); }

void prepare(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* tile) {
    neon_kernels.prepare(linear, x, x_stride, n_tokens, tile);
}

void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool once,
              float* sums) {
    if (linear.format != Format::INT8 && linear.format != Format::NF4)
        return neon_kernels.multiply(linear, tile, n_tokens, first, n_panels, once, sums);
    for (int64_t panel = first; panel < first + n_panels; ++panel, sums += n_tokens * kPanelRows) {
        for (int from = 0; from < n_tokens; from += 2)  // whose sums of 16 rows fill half of the 32 registers
            n_tokens - from == 1 ? panel_of<1>(linear, tile, n_tokens, from, panel, sums)
                                 : panel_of<2>(linear, tile, n_tokens, from, panel, sums);
    }
}

void gate(const float* gates, const float* ups, float* out) { neon_kernels.gate(gates, ups, out); }

}  // namespace

const Kernels i8mm_kernels = {"neon-i8mm", tile_bytes, prepare, multiply, gate};

}  // namespace petalite

PETALITE_TARGET_END
#endif
