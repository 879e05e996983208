// How activations are made ready for products of whole numbers: what is the same on all instruction sets.
//
// `Isa` takes 64 inputs, of which digits go to `n_words` words of four, out[0], out[stride], …; it gives sums of digits.
//   static uint32_t largest(const float* x);    the bits of the largest magnitude
//   static int32_t one_digit(const float* x, float inverse, int32_t* out, int64_t stride, int n_words);
//   static DigitSums two_digits(const float* x, float inverse, int32_t* out, int64_t stride, int n_words);
//       high ones at out[i · stride], low ones after each
// `inverse` is that of the digits' step.
#pragma once

#include <cmath>

#include "digits.h"
#include "tile.h"

namespace petalite {

struct DigitSums {
    int32_t high, low;
};

// 64 inputs with zeros where there are fewer: x[columns[i]], or x[i] where there are no columns.
struct Inputs {
    alignas(64) float values[64] = {};

    constexpr Inputs() = default;
    Inputs(const float* x, const int32_t* columns, int64_t n) {
        if (columns) for (int64_t i = 0; i < (n < 64 ? n : 64); ++i) values[i] = x[columns[i]];
        else std::memcpy(values, x, size_t(n < 64 ? n : 64) * 4);
    }
};

template <typename Isa>
void prepare_int8(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    static constexpr Inputs zeros;
    const Int8Tile tile(linear, memory, n_tokens);
    const int64_t n_rest = linear.n_in - linear.n_fine;
    for (int t = 0; t < n_tokens; ++t, x += x_stride) {
        const Inputs outliers(x, linear.columns, linear.n_fine);
        const float step = step_of(Isa::largest(outliers.values));
        const bool bad = std::isnan(step);
        const DigitSums sums = Isa::two_digits(bad ? zeros.values : outliers.values, bad ? 1.0f : 1 / step,
                                               tile.fine() + t * 2, n_tokens * 2, int(tile.n_fine));
        tile.fine_start()[t] = -128 * (255 * sums.high + sums.low);  // high digits meet fine codes, too
        tile.fine_factor()[t] = step / kDigit;

        uint32_t largest = 0;
        for (int64_t b = 0; b < tile.blocks(); ++b) {
            const Inputs inputs(x, linear.columns + linear.n_fine + b * 64, n_rest - b * 64);
            const uint32_t bits = Isa::largest(inputs.values);
            std::memcpy(&tile.factor(b)[t], &bits, 4);
            if (largest < bits) largest = bits;
        }
        const float unit = unit_of(largest);
        for (int64_t b = 0; b < tile.blocks(); ++b) {
            const Inputs inputs(x, linear.columns + linear.n_fine + b * 64, n_rest - b * 64);
            uint32_t bits;
            std::memcpy(&bits, &tile.factor(b)[t], 4);
            const float factor = tile.factor(b)[t] = multiple_of(bits, unit) * unit;
            const bool bad = std::isnan(factor);
            tile.start(b)[t] = -128 * Isa::one_digit(bad ? zeros.values : inputs.values, bad ? 1.0f : 1 / factor,
                                                     tile.block(b) + t, n_tokens, int(tile.steps(b)));
        }
    }
}

template <typename Isa>
void prepare_nf4(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    static constexpr Inputs zeros;
    const int64_t n_own = round_up(linear.n_in, kNf4Block) / kNf4Block;
    for (int t = 0; t < n_tokens; ++t, x += x_stride) {
        int32_t* block = static_cast<int32_t*>(memory);
        for (int64_t b = 0; b < Nf4Tile::blocks(linear); ++b, block += Nf4Tile::kWords * n_tokens) {
            const int64_t own = b * kNf4Block, fine = (b - n_own) * kNf4Block;
            const Inputs inputs = b < n_own ? Inputs(x + own, nullptr, linear.n_in - own)
                                            : Inputs(x, linear.columns + fine, linear.n_fine - fine);
            const float step = step_of(Isa::largest(inputs.values));
            const bool bad = std::isnan(step);
            const DigitSums sums = Isa::two_digits(bad ? zeros.values : inputs.values, bad ? 1.0f : 1 / step,
                                                   block + t * 2, n_tokens * 2, Nf4Tile::kSteps);
            int32_t* start = block + 32 * n_tokens;
            start[t] = -128 * (254 * sums.high + sums.low);
            reinterpret_cast<float*>(start + n_tokens)[t] = step * kNf4Unit;
        }
    }
}

}  // namespace petalite
