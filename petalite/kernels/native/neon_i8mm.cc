// NEON's products of 2 × 8 by 8 × 2 bytes (ARMv8.6: Graviton 3, Apple M2, Cortex-X2 and later), half as many as dot
// products for nf4 and for int8 of several tokens. All else is neon.cc's.
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

// What the outlier columns, which are few, add to a quarter of a panel.
template <int T>
inline void outliers(const Int8Tile& tile, int from, const uint8_t* weight, float32x4_t* total) {
    int32x4_t high[T], low[T];
    for (int t = 0; t < T; ++t) high[t] = low[t] = vdupq_n_s32(0);
    const int32_t* words = tile.fine() + from * 2;
    for (int64_t k = 0; k < tile.n_fine; ++k, weight += 128, words += tile.n_tokens * 2) {
        const int8x16_t codes = codes_at(weight), fine = codes_at(weight + 64);
        for (int t = 0; t < T; ++t) {
            const int8x16_t of_high = every(words[t * 2]), of_low = every(words[t * 2 + 1]);
            high[t] = vdotq_s32(high[t], codes, of_high);
            low[t] = vdotq_s32(vdotq_s32(low[t], codes, of_low), fine, of_high);
        }
    }
    for (int t = 0; t < T; ++t)
        total[t] = vmulq_n_f32(vcvtq_f32_s32(vmlaq_n_s32(low[t], high[t], 254)), tile.fine_factor()[from + t]);
}

// Two tokens are the columns of one product. Of the last by itself the other column is of whatever words come next in
// the tile, where a block's starts and factors follow its digits; its sums go nowhere.
template <int T>
void int8_panel(const Linear& linear, const void* memory, int n_tokens, int from, int64_t panel, float* sums) {
    constexpr int kPairs = (T + 1) / 2;
    const Int8Tile tile(linear, memory, n_tokens);
    const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
    float32x4_t total[kQuarters][T];
    for (int q = 0; q < kQuarters; ++q) outliers<T>(tile, from, weight + q * 16, total[q]);
    weight += tile.n_fine * 128;
    for (int64_t b = 0; b < tile.blocks(); ++b) {
        Sums<kPairs> all[kQuarters];
        const int32_t* words = tile.block(b) + from;
        int8x16_t digits[kPairs];
        int64_t k = 0;
        for (; k + 1 < tile.steps(b); k += 2, weight += 128, words += n_tokens * 2) {
            prefetch(weight), prefetch(weight + 64);
            for (int p = 0; p < kPairs; ++p) digits[p] = digits_at(words + p * 2, words + n_tokens + p * 2);
            for (int q = 0; q < kQuarters; ++q)
                all[q].add(codes_at(weight + q * 16), codes_at(weight + 64 + q * 16), digits);
        }
        if (k < tile.steps(b)) {  // the last of all, one more step of four inputs, and none to go with it
            const int32_t none[2] = {0, 0};
            for (int p = 0; p < kPairs; ++p) digits[p] = digits_at(words + p * 2, none);
            for (int q = 0; q < kQuarters; ++q) all[q].add(codes_at(weight + q * 16), vdupq_n_s8(0), digits);
        }
        const float* factor = tile.factor(b) + from;
        for (int q = 0; q < kQuarters; ++q) {
            for (int t = 0; t < T; ++t) {
                const int32x4_t whole = t % 2 ? all[q].second(t / 2) : all[q].first(t / 2);
                total[q][t] = vfmaq_n_f32(total[q][t], vcvtq_f32_s32(whole), factor[t]);
            }
        }
    }
    for (int q = 0; q < kQuarters; ++q) {
        const float32x4_t scale = vld1q_f32(linear.scale + panel * kPanelRows + q * 4);
        for (int t = 0; t < T; ++t) vst1q_f32(sums + (from + t) * kPanelRows + q * 4, vmulq_f32(total[q][t], scale));
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
                digits[t] = digits_at(words, words + n_tokens * 2);  // high ones, low ones
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
                const int32x4_t whole = vmlaq_n_s32(all[q].second(t), all[q].first(t), 254);
                total[q][t] = vfmaq_f32(total[q][t], vcvtq_f32_s32(whole), vmulq_n_f32(scale, factor[t]));
            }
        }
    }
    for (int q = 0; q < kQuarters; ++q)
        for (int t = 0; t < T; ++t) vst1q_f32(sums + (from + t) * kPanelRows + q * 4, total[q][t]);
}

size_t tile_bytes(const Linear& linear, int n_tokens) { return neon_kernels.tile_bytes(linear, n_tokens); }

void prepare(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* tile) {
    neon_kernels.prepare(linear, x, x_stride, n_tokens, tile);
}

// Of up to as many tokens as have sums of 16 rows that fill half of the 32 registers.
using Panel = void (*)(const Linear&, const void* tile, int n_tokens, int from, int64_t panel, float* sums);
constexpr Panel kInt8Panels[4] = {int8_panel<1>, int8_panel<2>, int8_panel<3>, int8_panel<4>};
constexpr Panel kNf4Panels[2] = {nf4_panel<1>, nf4_panel<2>};

void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool once,
              float* sums) {
    const bool int8 = linear.format == Format::INT8;
    if (int8 ? n_tokens == 1 : linear.format != Format::NF4)
        return neon_kernels.multiply(linear, tile, n_tokens, first, n_panels, once, sums);
    const int most = int8 ? 4 : 2;
    for (int64_t panel = first; panel < first + n_panels; ++panel, sums += n_tokens * kPanelRows) {
        for (int from = 0; from < n_tokens; from += most) {
            const int now = n_tokens - from < most ? n_tokens - from : most;
            (int8 ? kInt8Panels : kNf4Panels)[now - 1](linear, tile, n_tokens, from, panel, sums);
        }
    }
}

void gate(const float* gates, const float* ups, float* out) { neon_kernels.gate(gates, ups, out); }

}  // namespace

const Kernels i8mm_kernels = {"neon-i8mm", tile_bytes, prepare, multiply, gate};

}  // namespace petalite

PETALITE_TARGET_END
#endif
