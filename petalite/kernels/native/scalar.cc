// The reference: every product in plain loops, in the order that the other instruction sets keep to.
#include <algorithm>

#include "half.h"
#include "kernels.h"
#include "prepare.h"
#include "short.h"

#define PETALITE_ISA linear_scalar
#include "simd.h"

namespace petalite {
namespace {

#include "gate.h"

template <typename T>
T load(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// -- whole numbers -------------------------------------------------------------------------------------------

struct Scalar {
    static uint32_t largest(const float* x) {
        uint32_t largest = 0;
        for (int i = 0; i < 64; ++i) largest = std::max(largest, magnitude_bits(x[i]));
        return largest;
    }

    static int32_t one_digit(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        int32_t sum = 0;
        for (int i = 0; i < n_words; ++i) {
            int8_t digits[4];
            for (int c = 0; c < 4; ++c) sum += digits[c] = int8_t(std::nearbyint(x[i * 4 + c] * inverse));
            std::memcpy(out + i * stride, digits, 4);
        }
        return sum;
    }

    static DigitSums two_digits(const float* x, float inverse, int32_t* out, int64_t stride, int n_words) {
        DigitSums sums{0, 0};
        for (int i = 0; i < n_words; ++i) {
            int8_t digits[8];  // four high ones, four low ones
            for (int c = 0; c < 4; ++c) {
                const float scaled = x[i * 4 + c] * inverse, high = std::nearbyint(scaled);
                sums.high += digits[c] = int8_t(high);
                sums.low += digits[4 + c] = int8_t(std::nearbyint((scaled - high) * kDigit));
            }
            std::memcpy(out + i * stride, digits, 8);
        }
        return sums;
    }
};

// Four codes with 128 added, times four digits. In uint32_t, which wraps as the instructions do.
uint32_t dot4(const uint8_t* codes, int32_t digits) {
    int8_t parts[4];
    std::memcpy(parts, &digits, 4);
    uint32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += uint32_t(int32_t(codes[i]) * parts[i]);
    return sum;
}

// What row r multiplies with the inputs of a block's step k, 128 added.
void values_at(Format format, const uint8_t* block, int step_bytes, int k, int r, uint8_t* values) {
    if (format == Format::INT8) {
        std::memcpy(values, block + k * step_bytes + r * 4, 4);
        return;
    }
    for (int c = 0; c < 4; ++c) {
        const uint8_t byte = block[k / 2 * 64 + r * 4 + c];
        values[c] = uint8_t(kNf4Levels[k % 2 ? byte >> 4 : byte & 15] + 128);
    }
}

// Row r's product with token t.
float multiply_row(const Linear& linear, const DigitTile& tile, const uint8_t* block, int r, int t) {
    const bool int8 = linear.format == Format::INT8;
    uint8_t values[4];
    float sum = 0;
    const auto add = [&](uint32_t whole, float factor) {  // and on to the next block
        if (int8) sum = std::fma(float(int32_t(whole)), factor, sum);
        else sum = std::fma(float(int32_t(whole)), load<float>(block + 512 + r * 4) * factor, sum);
    };
    for (int codes = 0; codes < (int8 ? 1 : 2); ++codes) {
        for (int64_t b = 0; b < tile.fine_blocks(); ++b) {
            uint32_t high = 0, low = uint32_t(tile.fine_start(b)[t]);
            for (int k = 0; k < tile.fine_steps(b); ++k) {
                const int32_t* digits = tile.fine(b) + (k * tile.n_tokens + t) * 2;
                values_at(linear.format, block, 128, k, r, values);
                high += dot4(values, digits[0]);
                low += dot4(values, digits[1]);
                if (int8) low += dot4(block + k * 128 + 64 + r * 4, digits[0]);
            }
            add(254 * high + low, tile.fine_factor(b)[t]);
            block += int8 ? tile.fine_steps(b) * 128 : kNf4BlockBytes;
        }
    }
    for (int64_t b = 0; b < tile.blocks(); ++b) {
        uint32_t whole = uint32_t(tile.start(b)[t]);
        for (int k = 0; k < tile.steps(b); ++k) {
            values_at(linear.format, block, 64, k, r, values);
            whole += dot4(values, tile.block(b)[k * tile.n_tokens + t]);
        }
        add(whole, tile.factor(b)[t]);
        block += int8 ? tile.steps(b) * 64 : kNf4BlockBytes;
    }
    return sum;
}

void multiply_digits(const Linear& linear, const void* memory, int n_tokens, int64_t first, int64_t n_panels,
                     float* sums) {
    const DigitTile tile(linear, memory, n_tokens);
    for (int64_t panel = first; panel < first + n_panels; ++panel) {
        const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
        for (int t = 0; t < n_tokens; ++t)
            for (int r = 0; r < kPanelRows; ++r)
                *sums++ = multiply_row(linear, tile, weight, r, t) *
                          (linear.format == Format::INT8 ? linear.scale[panel * kPanelRows + r] : kNf4Unit);
    }
}

// -- floats --------------------------------------------------------------------------------------------------

void prepare_float(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    float* columns = static_cast<float*>(memory);
    for (int64_t k = 0; k < float_columns(linear); ++k)
        for (int t = 0; t < n_tokens; ++t) *columns++ = k < linear.n_in ? x[t * x_stride + k] : 0.0f;
}

float weight_at(Format format, const uint8_t* panel, int64_t k, int r) {
    switch (format) {
        case Format::F32: return load<float>(panel + (k * 16 + r) * 4);
        case Format::BF16: return float_of_bits(uint32_t(load<uint16_t>(panel + (k / 2 * 32 + r * 2 + k % 2) * 2)) << 16);
        default: return half_to_float(load<uint16_t>(panel + (k * 16 + r) * 2));
    }
}

// Sums of the inputs at even places and of those at odd ones, added at the end.
void multiply_float(const Linear& linear, const void* memory, int n_tokens, int64_t first, int64_t n_panels,
                    float* sums) {
    const float* columns = static_cast<const float*>(memory);
    for (int64_t panel = first; panel < first + n_panels; ++panel) {
        const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
        for (int t = 0; t < n_tokens; ++t) {
            for (int r = 0; r < kPanelRows; ++r) {
                float halves[2] = {0, 0};
                for (int64_t k = 0; k < linear.n_in; ++k)
                    halves[k % 2] = std::fma(weight_at(linear.format, weight, k, r), columns[k * n_tokens + t],
                                             halves[k % 2]);
                *sums++ = halves[0] + halves[1];
            }
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
    const auto run = has_digits(linear.format) ? prepare_digits<Scalar> : prepare_float;
    run(linear, x, x_stride, n_tokens, tile);
}

void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool,
              float* sums) {
    if (linear.format == Format::BF12) return multiply_short(linear, tile, n_tokens, first, n_panels, sums, multiply);
    const auto run = has_digits(linear.format) ? multiply_digits : multiply_float;
    run(linear, tile, n_tokens, first, n_panels, sums);
}

}  // namespace

const Kernels scalar_kernels = {"scalar", tile_bytes, prepare, multiply, gate_by, false};

}  // namespace petalite
