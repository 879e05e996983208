// BF12: bfloat16 numbers in 12 bits, none of them changed.
//
// A weight's exponents are few: fourteen neighbours are those of all its numbers but one of thousands. So a number is kept
// as its lower byte and, of four bits, a code for its upper byte, which is its sign and its exponent's upper seven bits; one
// of the codes is for zero. The few numbers with another exponent are zeros there, and follow the panel:
//   64 bytes                 the upper bytes that codes stand for, 16; then uint32, how many exceptions there are
//   192 for each 8 inputs    a line of codes, of BF16's steps 4i and 4i + 1 in the lower halves, of 4i + 2 and 4i + 3 in
//                            the upper; lower bytes of the former two; of the latter. Of two steps, 8 numbers of the one
//                            and 8 of the other take turns, as instructions that join bytes into pairs want it
//   8 for each exception     see below; in order. `n_fine` is the most that any panel has; filled up to whole lines
// A product adds them after all others: a branch for them on the way would cost more than all that is saved.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"
#include "half.h"

namespace petalite {

constexpr int kShortNumbers = int(kShortInputs) * kPanelRows;

struct ShortException {
    uint32_t place;  // input · 16 + row
    uint16_t value, unused;
};
static_assert(sizeof(ShortException) == kShortException);

inline int64_t short_blocks(int64_t n_in) { return (n_in + kShortInputs - 1) / kShortInputs; }

// Where eight numbers of a block's step eight / 4 lie in its lower bytes.
inline int short_place(int eight) { return eight / 8 * 64 + eight % 4 * 16 + eight / 4 % 2 * 8; }

struct ShortPanel {
    const uint8_t *upper, *blocks, *exceptions;
    uint32_t n_exceptions;

    ShortPanel(const uint8_t* panel, int64_t n_in)
        : upper(panel), blocks(panel + kShortHeader), exceptions(blocks + short_blocks(n_in) * kShortBlock) {
        std::memcpy(&n_exceptions, panel + 16, 4);
    }

    // f(input, row, value) for each exception.
    template <typename F>
    void each_exception(F f) const {
        for (uint32_t i = 0; i < n_exceptions; ++i) {
            ShortException one;
            std::memcpy(&one, exceptions + i * sizeof one, sizeof one);
            f(int64_t(one.place / kPanelRows), int(one.place % kPanelRows), one.value);
        }
    }
};

// A panel as BF16 has it, exceptions as zeros. Writes whole blocks.
inline void widen_short(const ShortPanel& panel, int64_t n_in, uint16_t* out) {
    const uint8_t* block = panel.blocks;
    for (int64_t b = 0; b < short_blocks(n_in); ++b, block += kShortBlock) {
        for (int eight = 0; eight < kShortNumbers / 8; ++eight, out += 8) {  // of step eight / 4
            const int at = short_place(eight);
            for (int i = 0; i < 8; ++i) {
                const int code = block[at % 64 + i] >> at / 64 * 4 & 15;
                out[i] = uint16_t(panel.upper[code] << 8 | block[64 + at + i]);
            }
        }
    }
}

// Adds the exceptions to sums (n_tokens, 16). input(k, t): input k of token t.
template <typename Input>
inline void add_exceptions(const ShortPanel& panel, int n_tokens, float* sums, Input input) {
    panel.each_exception([&](int64_t k, int row, uint16_t bits) {
        const float value = float_of_bits(uint32_t(bits) << 16);
        for (int t = 0; t < n_tokens; ++t) {
            float& sum = sums[t * kPanelRows + row];
            sum = std::fma(value, input(k, t), sum);
        }
    });
}

// `Kernels::multiply` for instruction sets that read BF16 alone and have float columns in their tiles: no faster than they are
// with BF16, so their weights are not made so.
template <typename Multiply>
inline void multiply_short(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, float* sums,
                           Multiply multiply) {
    const auto* columns = static_cast<const float*>(tile);
    std::vector<uint16_t> numbers(size_t(short_blocks(linear.n_in) * kShortNumbers));
    Linear dense = linear;
    dense.format = Format::BF16, dense.weight = reinterpret_cast<const uint8_t*>(numbers.data());
    for (int64_t p = first; p < first + n_panels; ++p, sums += n_tokens * kPanelRows) {
        const ShortPanel panel(linear.weight + p * panel_bytes(linear), linear.n_in);
        widen_short(panel, linear.n_in, numbers.data());
        multiply(dense, tile, n_tokens, 0, 1, false, sums);
        add_exceptions(panel, n_tokens, sums, [&](int64_t k, int t) { return columns[k * n_tokens + t]; });
    }
}

}  // namespace petalite
