// AVX2 with FMA and F16C: every x86-64 server and desktop since 2013 (Haswell), 2015 (Excavator).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "prepare.h"
#include "short.h"
#include "target.h"

PETALITE_TARGET_BEGIN("avx2,fma,f16c")

#define PETALITE_SIMD_AVX2 1
#define PETALITE_ISA linear_avx2
#include "simd.h"

namespace petalite {
namespace {

#include "gate.h"

constexpr int kAhead = 2048;  // bytes: how far before its use a line of weights is asked for

// Rows go in halves of a panel, 8 at a time: `V` of them from `half` on, of which two make a panel.
struct Halves {
    const uint8_t* weight;
    int64_t stride;  // of a panel
    int64_t half;

    Halves(const Linear& linear, int64_t half)
        : weight(linear.weight + half / 2 * panel_bytes(linear)), stride(panel_bytes(linear)), half(half) {}

    // Of the v-th half, `step_bytes` being what all 16 rows of a step take.
    const uint8_t* at(int v, int64_t offset, int step_bytes) const {
        const int64_t which = half % 2 + v;
        return weight + which / 2 * stride + which % 2 * (step_bytes / 2) + offset;
    }
};

// Weights that this product alone reads leave nothing in the larger caches: what a step does between two passes over
// the weights (the interpreter, sockets, ciphers) finds its own code and data there, some three times faster.
inline void prefetch(const uint8_t* at, bool once) {
    const char* line = reinterpret_cast<const char*>(at + kAhead);
    once ? _mm_prefetch(line, _MM_HINT_NTA) : _mm_prefetch(line, _MM_HINT_T0);
}
inline __m256i bytes_at(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline __m256i every(int32_t word) { return _mm256_set1_epi32(word); }

// -- digits --------------------------------------------------------------------------------------------------

struct Avx2 {
    static uint32_t largest(const float* x) {
        __m256i largest = _mm256_setzero_si256();
        for (int i = 0; i < 64; i += 8)
            largest = _mm256_max_epu32(largest, _mm256_and_si256(bytes_at(x + i), every(0x7fffffff)));
        uint32_t each[8], result = 0;
        std::memcpy(each, &largest, 32);
        for (uint32_t value : each) result = result < value ? value : result;
        return result;
    }

    // Codes are taken as they are, without 128 added: nothing asks for sums of digits.
    static int32_t one_digit(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        for (int i = 0; i < n_words; i += 2) {
            const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i * 4), _mm256_set1_ps(inverse));
            const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(scaled), _mm256_setzero_si256());
            const __m256i digits = _mm256_packs_epi16(words, words);
            out[i * stride] = _mm256_extract_epi32(digits, 0);
            if (i + 1 < n_words) out[(i + 1) * stride] = _mm256_extract_epi32(digits, 4);
        }
        return 0;
    }

    static DigitSums two_digits(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        for (int i = 0; i < n_words; i += 2) {
            const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i * 4), _mm256_set1_ps(inverse));
            const __m256 high = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            const __m256 rest = _mm256_mul_ps(_mm256_sub_ps(scaled, high), _mm256_set1_ps(kDigit));
            const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(high), _mm256_cvtps_epi32(rest));
            const __m256i packed = _mm256_packs_epi16(words, words);
            const int64_t pairs[2] = {_mm256_extract_epi64(packed, 0), _mm256_extract_epi64(packed, 2)};
            for (int w = 0; w < 2 && i + w < n_words; ++w) std::memcpy(out + (i + w) * stride, &pairs[w], 8);
        }
        return {0, 0};
    }
};

// -- whole numbers -------------------------------------------------------------------------------------------

// sum += four codes · four digits in each lane. |codes| as bytes without a sign, and theirs given to the digits: two
// products of at most 128 · 127 fit in 16 bits.
inline __m256i dot(__m256i sum, __m256i sizes, __m256i codes, __m256i digits) {
    const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(digits, codes));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// add(v, values, digits, where they are) for each half v and step of a block, which begins at `offset` and has `n_words` of
// digits a step.
template <Format F, int V, typename Add>
inline void over_steps(const Halves& halves, int64_t& offset, int step_bytes, const int32_t* digits, const int32_t* end,
                       int n_words, bool once, Add add) {
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4Levels)));
    while (digits < end) {
        for (int v = 0; v < V; ++v) {
            const uint8_t* at = halves.at(v, offset, 64);
            const __m256i codes = bytes_at(at), four = _mm256_set1_epi8(15);
            prefetch(at, once);
            if constexpr (F == Format::INT8) {
                add(v, _mm256_xor_si256(codes, _mm256_set1_epi8(int8_t(0x80))), digits, at);
            } else {
                add(v, _mm256_shuffle_epi8(levels, _mm256_and_si256(codes, four)), digits, at);
                const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), four);
                add(v, _mm256_shuffle_epi8(levels, upper), digits + n_words, at);
            }
        }
        offset += F == Format::INT8 ? step_bytes : 64;
        digits += F == Format::INT8 ? n_words : 2 * n_words;
    }
}

// What a block's sums come to; on to where the next one begins.
template <Format F, int T, int V>
inline void add_block(const Halves& halves, int64_t& offset, const __m256i (*whole)[T], const float* factor,
                      __m256 (*total)[T]) {
    for (int v = 0; v < V; ++v) {
        for (int t = 0; t < T; ++t) {
            __m256 unit = _mm256_set1_ps(factor[t]);
            if constexpr (F == Format::NF4)
                unit = _mm256_mul_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(halves.at(v, offset, 64))), unit);
            total[v][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[v][t]), unit, total[v][t]);
        }
    }
    if (F == Format::NF4) offset += 64;
}

// T tokens of the tile from `from` on, V halves of panels.
template <Format F, int T, int V>
void digits_halves(const Linear& linear, const void* memory, int n_tokens, int from, int64_t half, bool once,
                   float* sums) {
    const DigitTile tile(linear, memory, n_tokens);
    const Halves halves(linear, half);
    int64_t offset = 0;
    __m256 total[V][T];
    for (int v = 0; v < V; ++v)
        for (int t = 0; t < T; ++t) total[v][t] = _mm256_setzero_ps();
    for (int codes = 0; codes < (F == Format::NF4 ? 2 : 1); ++codes) {
        for (int64_t b = 0; b < tile.fine_blocks(); ++b) {
            __m256i high[V][T], low[V][T];
            for (int v = 0; v < V; ++v)
                for (int t = 0; t < T; ++t) high[v][t] = low[v][t] = _mm256_setzero_si256();
            const auto add = [&](int v, __m256i values, const int32_t* digits, const uint8_t* at) {
                const __m256i sizes = _mm256_abs_epi8(values);
                for (int t = 0; t < T; ++t) {
                    high[v][t] = dot(high[v][t], sizes, values, every(digits[t * 2]));
                    low[v][t] = dot(low[v][t], sizes, values, every(digits[t * 2 + 1]));
                }
                if constexpr (F == Format::INT8) {
                    prefetch(at + 64, once);
                    const __m256i fine = _mm256_xor_si256(bytes_at(at + 64), _mm256_set1_epi8(int8_t(0x80)));
                    const __m256i fine_sizes = _mm256_abs_epi8(fine);
                    for (int t = 0; t < T; ++t) low[v][t] = dot(low[v][t], fine_sizes, fine, every(digits[t * 2]));
                }
            };
            const int32_t* digits = tile.fine(b) + from * 2;
            over_steps<F, V>(halves, offset, 128, digits, tile.fine_start(b), n_tokens * 2, once, add);
            for (int v = 0; v < V; ++v)
                for (int t = 0; t < T; ++t)
                    low[v][t] = _mm256_add_epi32(_mm256_mullo_epi32(high[v][t], every(254)), low[v][t]);
            add_block<F, T, V>(halves, offset, low, tile.fine_factor(b) + from, total);
        }
    }
    for (int64_t b = 0; b < tile.blocks(); ++b) {
        __m256i whole[V][T];
        for (int v = 0; v < V; ++v)
            for (int t = 0; t < T; ++t) whole[v][t] = _mm256_setzero_si256();
        const auto add = [&](int v, __m256i values, const int32_t* digits, const uint8_t*) {
            const __m256i sizes = _mm256_abs_epi8(values);
            for (int t = 0; t < T; ++t) whole[v][t] = dot(whole[v][t], sizes, values, every(digits[t]));
        };
        over_steps<F, V>(halves, offset, 64, tile.block(b) + from, tile.start(b), n_tokens, once, add);
        add_block<F, T, V>(halves, offset, whole, tile.factor(b) + from, total);
    }
    for (int v = 0; v < V; ++v) {
        const int64_t which = half % 2 + v;
        const __m256 scale =
            F == Format::INT8 ? _mm256_loadu_ps(linear.scale + (half + v) * 8) : _mm256_set1_ps(kNf4Unit);
        for (int t = 0; t < T; ++t)
            _mm256_storeu_ps(sums + (which / 2 * n_tokens + from + t) * kPanelRows + which % 2 * 8,
                             _mm256_mul_ps(total[v][t], scale));
    }
}

// -- floats --------------------------------------------------------------------------------------------------

void prepare_float(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    float* columns = static_cast<float*>(memory);
    for (int64_t k = 0; k < float_columns(linear); ++k)
        for (int t = 0; t < n_tokens; ++t) *columns++ = k < linear.n_in ? x[t * x_stride + k] : 0.0f;
}

// Inputs 2i and 2i + 1 of 8 rows.
struct Pair {
    __m256 even, odd;
};

template <Format F>
inline Pair load_pair(const Halves& halves, int v, int64_t i) {
    if constexpr (F == Format::F32) {
        const auto* at = reinterpret_cast<const float*>(halves.at(v, i * 128, 64));
        return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 16)};
    } else if constexpr (F == Format::F16) {
        const auto* at = reinterpret_cast<const __m128i*>(halves.at(v, i * 64, 32));
        return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 2))};
    } else {
        const __m256i both = bytes_at(halves.at(v, i * 64, 64));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(both, every(int32_t(0xffff0000))))};
    }
}

// Sums of the inputs at even places and of those at odd ones, added at the end: the same order for any T and V.
template <Format F, int T, int V>
void float_halves(const Linear& linear, const void* tile, int n_tokens, int from, int64_t half, bool once,
            float* sums) {
    const Halves halves(linear, half);
    __m256 even[V][T], odd[V][T];
    for (int v = 0; v < V; ++v)
        for (int t = 0; t < T; ++t) even[v][t] = odd[v][t] = _mm256_setzero_ps();
    const float* columns = static_cast<const float*>(tile) + from;
    // A float32 panel of an odd number of inputs ends in the middle of a pair.
    const int64_t n_pairs = F == Format::F32 ? linear.n_in / 2 : (int64_t(linear.n_in) + 1) / 2;
    for (int64_t i = 0; i < n_pairs; ++i, columns += n_tokens * 2) {
        for (int v = 0; v < V; ++v) {
            const Pair weights = load_pair<F>(halves, v, i);
            prefetch(halves.at(v, i * (F == Format::F32 ? 128 : 64), 64), once);
            for (int t = 0; t < T; ++t) {
                even[v][t] = _mm256_fmadd_ps(weights.even, _mm256_set1_ps(columns[t]), even[v][t]);
                odd[v][t] = _mm256_fmadd_ps(weights.odd, _mm256_set1_ps(columns[n_tokens + t]), odd[v][t]);
            }
        }
    }
    if (F == Format::F32 && linear.n_in % 2) {
        for (int v = 0; v < V; ++v) {
            const __m256 last = _mm256_loadu_ps(reinterpret_cast<const float*>(halves.at(v, n_pairs * 128, 64)));
            for (int t = 0; t < T; ++t) even[v][t] = _mm256_fmadd_ps(last, _mm256_set1_ps(columns[t]), even[v][t]);
        }
    }
    for (int v = 0; v < V; ++v) {
        const int64_t which = half % 2 + v;
        for (int t = 0; t < T; ++t)
            _mm256_storeu_ps(sums + (which / 2 * n_tokens + from + t) * kPanelRows + which % 2 * 8,
                             _mm256_add_ps(even[v][t], odd[v][t]));
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
    const auto run = has_digits(linear.format) ? prepare_digits<Avx2> : prepare_float;
    run(linear, x, x_stride, n_tokens, tile);
}

template <int T, int V>
void halves_of(const Linear& linear, const void* tile, int n_tokens, int from, int64_t half, bool once,
            float* sums) {
    switch (linear.format) {
        case Format::F32: return float_halves<Format::F32, T, V>(linear, tile, n_tokens, from, half, once, sums);
        case Format::BF16: return float_halves<Format::BF16, T, V>(linear, tile, n_tokens, from, half, once, sums);
        case Format::F16: return float_halves<Format::F16, T, V>(linear, tile, n_tokens, from, half, once, sums);
        case Format::INT8: return digits_halves<Format::INT8, T, V>(linear, tile, n_tokens, from, half, once, sums);
        case Format::NF4: return digits_halves<Format::NF4, T, V>(linear, tile, n_tokens, from, half, once, sums);
        case Format::BF12: return;  // `multiply_short`
    }
}

// As many tokens and rows as the 16 registers hold sums of.
void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool once,
              float* sums) {
    if (linear.format == Format::BF12) return multiply_short(linear, tile, n_tokens, first, n_panels, sums, multiply);
    if (n_tokens > 4) once = false;  // the second four meet the same weights
    for (int64_t p = 0; p < n_panels;) {
        const int now = n_tokens == 1 && n_panels - p >= 2 ? 2 : 1;
        const int64_t half = (first + p) * 2;
        for (int from = 0; from < n_tokens; from += 4) {
            const int left = n_tokens - from;
            if (now == 2) halves_of<1, 4>(linear, tile, n_tokens, from, half, once, sums);
            else if (left == 1) halves_of<1, 2>(linear, tile, n_tokens, from, half, once, sums);
            else if (left == 2) halves_of<2, 2>(linear, tile, n_tokens, from, half, once, sums);
            else
                for (int v = 0; v < 2; ++v)
                    left == 3 ? halves_of<3, 1>(linear, tile, n_tokens, from, half + v, once, sums)
                              : halves_of<4, 1>(linear, tile, n_tokens, from, half + v, once, sums);
        }
        sums += now * n_tokens * kPanelRows;
        p += now;
    }
}

}  // namespace

const Kernels avx2_kernels = {"avx2", tile_bytes, prepare, multiply, gate_by, false};

}  // namespace petalite

PETALITE_TARGET_END
#endif
