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

// 64 inputs x[columns[i]], with zeros where there are fewer.
struct Inputs {
    alignas(64) float values[64] = {};

    constexpr Inputs() = default;
    Inputs(const float* x, const int32_t* columns, int64_t n) {
        for (int64_t i = 0; i < (n < 64 ? n : 64); ++i) values[i] = x[columns[i]];
    }
};

template <typename Isa>
void prepare_digits(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    static constexpr Inputs zeros;
    const DigitTile tile(linear, memory, n_tokens);
    const int highs = linear.format == Format::INT8 ? 255 : 254;  // int8's high digits meet fine codes, too
    const int64_t n_rest = linear.n_in - linear.n_fine;
    for (int t = 0; t < n_tokens; ++t, x += x_stride) {
        for (int64_t b = 0; b < tile.fine_blocks(); ++b) {
            const Inputs inputs(x, linear.columns + b * 64, linear.n_fine - b * 64);
            const float step = step_of(Isa::largest(inputs.values));
            const bool bad = std::isnan(step);
            const DigitSums sums = Isa::two_digits(bad ? zeros.values : inputs.values, bad ? 1.0f : 1 / step,
                                                   tile.fine(b) + t * 2, n_tokens * 2, tile.fine_steps(b));
            tile.fine_start(b)[t] = -128 * (highs * sums.high + sums.low);
            tile.fine_factor(b)[t] = step / kDigit;
        }
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
                                                     tile.block(b) + t, n_tokens, tile.steps(b));
        }
    }
}

}  // namespace petalite
