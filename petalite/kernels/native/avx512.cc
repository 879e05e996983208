// AVX512 with VNNI, VBMI and BF16: Zen 4, Cooper Lake's successors (Sapphire Rapids), and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "prepare.h"
#include "short.h"
#include "target.h"

PETALITE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,fma")

#define PETALITE_SIMD_AVX512 1
#define PETALITE_ISA linear_avx512
#include "simd.h"

namespace petalite {
namespace {

#include "gate.h"

constexpr int kAhead = 2048;     // bytes: how far before its use a line of weights is asked for
constexpr int kFarAhead = 6144;  // where products leave memory no time to spare

// Weights that this product alone reads leave nothing in the larger caches: what a step does between two passes over the
// weights (the interpreter, sockets, ciphers) finds its own code and data there, up to three times faster. Bytes met by
// one token leave the processor time to run ahead by itself, which gives 1.05 times the rate of asking it to. Several tokens'
// products take as long as memory does: both at once only if lines are in the second cache long before.
template <Format F, int T>
inline void prefetch(const uint8_t* at, bool once) {
    if (T <= 2 && has_digits(F)) return;
    if (T >= 4) return _mm_prefetch(reinterpret_cast<const char*>(at + kFarAhead), _MM_HINT_T1);
    const char* line = reinterpret_cast<const char*>(at + kAhead);
    once ? _mm_prefetch(line, _MM_HINT_NTA) : _mm_prefetch(line, _MM_HINT_T0);
}
inline __m512i line(const uint8_t* at) { return _mm512_loadu_si512(at); }
inline __m512i every(int32_t word) { return _mm512_set1_epi32(word); }

// sum + four codes · the four digits of a word, in each lane. Compilers make two instructions and one more register of
// it, and above eight tokens run out of registers.
inline __m512i dot(__m512i sum, __m512i codes, const int32_t& digits) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(digits));
    return sum;
}

inline __m512 load_some(const float* x, int64_t n) {
    return n >= 16 ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), x);
}

// -- digits --------------------------------------------------------------------------------------------------

struct Avx512 {
    static uint32_t largest(const float* x) {
        __m512i largest = _mm512_setzero_si512();
        for (int i = 0; i < 64; i += 16) {
            const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + i), every(0x7fffffff));
            largest = _mm512_max_epu32(largest, bits);
        }
        return _mm512_reduce_max_epu32(largest);
    }

    static int32_t one_digit(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < n_words; i += 4) {
            const __m512i digits = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i * 4), _mm512_set1_ps(inverse)));
            sum = _mm512_add_epi32(sum, digits);
            int32_t words[4];
            _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(digits));
            for (int w = 0; w < 4 && i + w < n_words; ++w) out[(i + w) * stride] = words[w];
        }
        return _mm512_reduce_add_epi32(sum);
    }

    static DigitSums two_digits(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
        for (int i = 0; i < n_words; i += 4) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i * 4), _mm512_set1_ps(inverse));
            const __m512 high = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(scaled, high), _mm512_set1_ps(kDigit));
            const __m512i highs = _mm512_cvtps_epi32(high), lows = _mm512_cvtps_epi32(rest);
            high_sum = _mm512_add_epi32(high_sum, highs);
            low_sum = _mm512_add_epi32(low_sum, lows);
            const __m128i a = _mm512_cvtepi32_epi8(highs), b = _mm512_cvtepi32_epi8(lows);
            const __m128i pairs[2] = {_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)};
            for (int w = 0; w < 4 && i + w < n_words; ++w)
                std::memcpy(out + (i + w) * stride, reinterpret_cast<const char*>(pairs) + w * 8, 8);
        }
        return {_mm512_reduce_add_epi32(high_sum), _mm512_reduce_add_epi32(low_sum)};
    }
};

// -- whole numbers -------------------------------------------------------------------------------------------

// What codes stand for, 128 added. Of nf4 the levels, four times over: a look-up takes six bits, of which two are
// another code's.
inline __m512i nf4_values(__m512i codes) {
    const __m128i once = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4Levels));
    const __m512i table = _mm512_xor_si512(_mm512_broadcast_i32x4(once), _mm512_set1_epi8(int8_t(0x80)));
    return _mm512_permutexvar_epi8(codes, table);
}

// add(values, digits) for each step of a block, which begins at `weight` and has N words of digits a step.
template <Format F, int T, int N, typename Add>
inline const uint8_t* over_steps(const uint8_t* weight, int step_bytes, const int32_t* digits, const int32_t* end,
                                 bool once, Add add) {
    while (digits < end) {
        const __m512i codes = line(weight);
        prefetch<F, T>(weight, once);
        if constexpr (F == Format::INT8) {
            add(codes, digits, weight);
            weight += step_bytes, digits += N;
        } else {
            add(nf4_values(codes), digits, weight);
            add(nf4_values(_mm512_srli_epi16(codes, 4)), digits + N, weight);
            weight += 64, digits += 2 * N;
        }
    }
    return weight;
}

// What a block's sums come to, and where the next one begins.
template <Format F, int T>
inline const uint8_t* add_block(const uint8_t* weight, const __m512i* whole, const float* factor, bool once,
                                __m512* total) {
    __m512 scale;
    if constexpr (F == Format::NF4) {
        scale = _mm512_loadu_ps(weight);
        prefetch<F, T>(weight, once);
        weight += 64;
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
        __m512 unit = _mm512_set1_ps(factor[t]);
        if constexpr (F == Format::NF4) unit = _mm512_mul_ps(scale, unit);
        total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[t]), unit, total[t]);
    }
    return weight;
}

// Of the outlier columns, which have two digits and fine or second codes.
template <Format F, int T>
inline const uint8_t* add_outliers(const DigitTile& tile, const uint8_t* weight, bool once, __m512* total) {
    for (int codes = 0; codes < (F == Format::NF4 ? 2 : 1); ++codes) {
        for (int64_t b = 0; b < tile.fine_blocks(); ++b) {
            __m512i high[T], low[T];  // in registers only where every loop over them is unrolled
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) high[t] = _mm512_setzero_si512(), low[t] = every(tile.fine_start(b)[t]);
            const auto add = [&](__m512i values, const int32_t* digits, const uint8_t* at) {
#pragma GCC unroll 12
                for (int t = 0; t < T; ++t) {
                    high[t] = dot(high[t], values, digits[t * 2]);
                    low[t] = dot(low[t], values, digits[t * 2 + 1]);
                }
                if constexpr (F == Format::INT8) {
                    const __m512i fine = line(at + 64);
                    prefetch<F, T>(at + 64, once);
#pragma GCC unroll 12
                    for (int t = 0; t < T; ++t) low[t] = dot(low[t], fine, digits[t * 2]);
                }
            };
            weight = over_steps<F, T, 2 * T>(weight, 128, tile.fine(b), tile.fine_start(b), once, add);
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) {  // 254 · high + low
                const __m512i most = _mm512_sub_epi32(_mm512_slli_epi32(high[t], 8), _mm512_slli_epi32(high[t], 1));
                low[t] = _mm512_add_epi32(most, low[t]);
            }
            weight = add_block<F, T>(weight, low, tile.fine_factor(b), once, total);
        }
    }
    return weight;
}

template <Format F, int T>
void digits_panel(const Linear& linear, const void* memory, int64_t panel, bool once, float* sums) {
    const DigitTile tile(linear, memory, T);
    __m512 total[T];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
    const uint8_t* weight = add_outliers<F, T>(tile, linear.weight + panel * panel_bytes(linear), once, total);
    for (int64_t b = 0; b < tile.blocks(); ++b) {
        const int32_t* start = tile.start(b);
        __m512i whole[T];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) whole[t] = every(start[t]);
        const auto add = [&](__m512i values, const int32_t* digits, const uint8_t*) {
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) whole[t] = dot(whole[t], values, digits[t]);
        };
        weight = over_steps<F, T, T>(weight, 64, tile.block(b), start, once, add);
        weight = add_block<F, T>(weight, whole, tile.factor(b), once, total);
    }
    const bool int8 = F == Format::INT8;
    const __m512 scale = int8 ? _mm512_loadu_ps(linear.scale + panel * kPanelRows) : _mm512_set1_ps(kNf4Unit);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t, sums += kPanelRows) _mm512_storeu_ps(sums, _mm512_mul_ps(total[t], scale));
}

// -- floats --------------------------------------------------------------------------------------------------

void prepare_float(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    float* columns = static_cast<float*>(memory);
    for (int64_t k = 0; k < float_columns(linear); ++k)
        for (int t = 0; t < n_tokens; ++t) *columns++ = k < linear.n_in ? x[t * x_stride + k] : 0.0f;
}

void prepare_bf16(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    int32_t* columns = static_cast<int32_t*>(memory);
    const int64_t n_words = float_columns(linear) / 2;
    for (int t = 0; t < n_tokens; ++t, x += x_stride) {
        for (int64_t k = 0; k < n_words; k += 8) {
            int32_t pairs[8];
            const __m256bh rounded = _mm512_cvtneps_pbh(load_some(x + k * 2, linear.n_in - k * 2));
            std::memcpy(pairs, &rounded, 32);
            for (int64_t i = 0; i < (n_words - k < 8 ? n_words - k : 8); ++i) columns[(k + i) * n_tokens + t] = pairs[i];
        }
    }
}

template <Format F>
struct Float;

template <>
struct Float<Format::F32> {
    static constexpr int kBytes = 64;
    static __m512 load(const uint8_t* at) { return _mm512_loadu_ps(at); }
    static __m512 add(__m512 sum, __m512 weight, const void* columns, int64_t i) {
        return _mm512_fmadd_ps(weight, _mm512_set1_ps(static_cast<const float*>(columns)[i]), sum);
    }
};

template <>
struct Float<Format::F16> : Float<Format::F32> {
    static constexpr int kBytes = 32;
    static __m512 load(const uint8_t* at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
};

template <>
struct Float<Format::BF16> {
    static constexpr int kBytes = 64;
    static __m512bh load(const uint8_t* at) { return (__m512bh)line(at); }
    static __m512 add(__m512 sum, __m512bh weight, const void* columns, int64_t i) {
        return _mm512_dpbf16_ps(sum, weight, (__m512bh)every(static_cast<const int32_t*>(columns)[i]));
    }
};

// Sums of the even steps and of the odd ones, added at the end: the same order for any T.
template <Format F, int T>
void float_panel(const Linear& linear, const void* columns, int64_t panel, bool once, float* sums) {
    const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
    const int64_t n_steps = F == Format::BF16 ? (int64_t(linear.n_in) + 1) / 2 : int64_t(linear.n_in);
    __m512 halves[2][T];
    for (int h = 0; h < 2; ++h)
        for (int t = 0; t < T; ++t) halves[h][t] = _mm512_setzero_ps();
    const auto step = [&](int64_t k, int h) {
        const uint8_t* at = weight + k * Float<F>::kBytes;
        const auto values = Float<F>::load(at);
        prefetch<F, T>(at, once);
        for (int t = 0; t < T; ++t) halves[h][t] = Float<F>::add(halves[h][t], values, columns, k * T + t);
    };
    int64_t k = 0;
    for (; k + 1 < n_steps; k += 2) step(k, 0), step(k + 1, 1);
    if (k < n_steps) step(k, 0);
    for (int t = 0; t < T; ++t, sums += kPanelRows) _mm512_storeu_ps(sums, _mm512_add_ps(halves[0][t], halves[1][t]));
}

// -- BF12 ----------------------------------------------------------------------------------------------------

// What codes stand for, four times over: a look-up takes six bits, of which two are another code's.
inline __m512i upper_bytes(const ShortPanel& panel) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel.upper)));
}

// Four steps of BF16.
inline void widen_block(__m512i upper_bytes, const uint8_t* block, __m512i* steps) {
    const __m512i codes = line(block), lower = line(block + 64), others = line(block + 128);
    const __m512i upper = _mm512_permutexvar_epi8(codes, upper_bytes);
    const __m512i upper_of_others = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), upper_bytes);
    steps[0] = _mm512_unpacklo_epi8(lower, upper), steps[1] = _mm512_unpackhi_epi8(lower, upper);
    steps[2] = _mm512_unpacklo_epi8(others, upper_of_others), steps[3] = _mm512_unpackhi_epi8(others, upper_of_others);
}

// What is made of a line keeps the processor from running ahead as far as it does where lines are used as they are.
template <int T>
inline void prefetch_short(const uint8_t* at, bool once) {
    const char* line = reinterpret_cast<const char*>(at);
    if (T < 4) return once ? _mm_prefetch(line + 2 * kAhead, _MM_HINT_NTA) : _mm_prefetch(line + 2 * kAhead, _MM_HINT_T0);
    _mm_prefetch(line + 2 * kFarAhead, _MM_HINT_T1);
    _mm_prefetch(line + kAhead / 2, _MM_HINT_T0);
}

template <int T>
void short_panel(const Linear& linear, const void* columns, int64_t panel, bool once, float* sums) {
    const ShortPanel numbers(linear.weight + panel * panel_bytes(linear), linear.n_in);
    const __m512i upper = upper_bytes(numbers);
    __m512 halves[2][T];
    for (int h = 0; h < 2; ++h)
        for (int t = 0; t < T; ++t) halves[h][t] = _mm512_setzero_ps();
    const uint8_t* block = numbers.blocks;
    for (int64_t b = 0; b < short_blocks(linear.n_in); ++b, block += kShortBlock) {
        __m512i steps[4];
        widen_block(upper, block, steps);
        for (int i = 0; i < 3; ++i) prefetch_short<T>(block + i * 64, once);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t)
                halves[i % 2][t] = Float<Format::BF16>::add(halves[i % 2][t], (__m512bh)steps[i], columns, (b * 4 + i) * T + t);
    }
    for (int t = 0; t < T; ++t) _mm512_storeu_ps(sums + t * kPanelRows, _mm512_add_ps(halves[0][t], halves[1][t]));
    const auto* inputs = static_cast<const uint16_t*>(columns);
    add_exceptions(numbers, T, sums, [&](int64_t k, int t) {
        return float_of_bits(uint32_t(inputs[(k / 2 * T + t) * 2 + k % 2]) << 16);
    });
}

// -- the table -----------------------------------------------------------------------------------------------

size_t tile_bytes(const Linear& linear, int n_tokens) {
    switch (linear.format) {
        case Format::INT8:
        case Format::NF4: return DigitTile::bytes(linear, n_tokens);
        case Format::BF12:
        case Format::BF16: return size_t(float_columns(linear)) * n_tokens * 2;
        default: return size_t(float_columns(linear)) * n_tokens * 4;
    }
}

void prepare(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* tile) {
    const bool bf16 = linear.format == Format::BF16 || linear.format == Format::BF12;
    const auto run = has_digits(linear.format) ? prepare_digits<Avx512> : bf16 ? prepare_bf16 : prepare_float;
    run(linear, x, x_stride, n_tokens, tile);
}

template <int T>
void panel_of(const Linear& linear, const void* tile, int64_t panel, bool once, float* sums) {
    switch (linear.format) {
        case Format::F32: return float_panel<Format::F32, T>(linear, tile, panel, once, sums);
        case Format::BF16: return float_panel<Format::BF16, T>(linear, tile, panel, once, sums);
        case Format::F16: return float_panel<Format::F16, T>(linear, tile, panel, once, sums);
        case Format::INT8: return digits_panel<Format::INT8, T>(linear, tile, panel, once, sums);
        case Format::NF4: return digits_panel<Format::NF4, T>(linear, tile, panel, once, sums);
        case Format::BF12: return short_panel<T>(linear, tile, panel, once, sums);
    }
}

// One by one: memory gives one stream more than several.
template <int T>
void multiply_tokens(const Linear& linear, const void* tile, int64_t first, int64_t n_panels, bool once,
                     float* sums) {
    for (int64_t p = 0; p < n_panels; ++p, sums += T * kPanelRows) panel_of<T>(linear, tile, first + p, once, sums);
}

void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool once,
              float* sums) {
    constexpr decltype(&multiply_tokens<1>) kByTokens[] = {
        multiply_tokens<1>, multiply_tokens<2>, multiply_tokens<3>, multiply_tokens<4>,
        multiply_tokens<5>, multiply_tokens<6>, multiply_tokens<7>, multiply_tokens<8>,
        multiply_tokens<9>, multiply_tokens<10>, multiply_tokens<11>, multiply_tokens<12>,
    };
    kByTokens[n_tokens - 1](linear, tile, first, n_panels, once, sums);
}

}  // namespace

const Kernels avx512_kernels = {"avx512", tile_bytes, prepare, multiply, gate_by, true};

}  // namespace petalite

PETALITE_TARGET_END
#endif
