// The reference: every product in plain loops, in the order that the other instruction sets keep to.
#include <algorithm>

#include "half.h"
#include "kernels.h"
#include "prepare.h"

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

void multiply_int8(const Linear& linear, const void* memory, int n_tokens, int64_t first, int64_t n_panels,
                   float* sums) {
    const Int8Tile tile(linear, memory, n_tokens);
    for (int64_t panel = first; panel < first + n_panels; ++panel) {
        const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
        const uint8_t* rest = weight + tile.n_fine * 128;
        for (int t = 0; t < n_tokens; ++t) {
            for (int r = 0; r < kPanelRows; ++r) {
                uint32_t high = 0, low = uint32_t(tile.fine_start()[t]);
                for (int64_t k = 0; k < tile.n_fine; ++k) {
                    const int32_t* digits = tile.fine() + (k * n_tokens + t) * 2;
                    high += dot4(weight + k * 128 + r * 4, digits[0]);
                    low += dot4(weight + k * 128 + r * 4, digits[1]) + dot4(weight + k * 128 + 64 + r * 4, digits[0]);
                }
                float sum = float(int32_t(254 * high + low)) * tile.fine_factor()[t];
                for (int64_t b = 0; b < tile.blocks(); ++b) {
                    uint32_t whole = uint32_t(tile.start(b)[t]);
                    for (int64_t k = 0; k < tile.steps(b); ++k)
                        whole += dot4(rest + (b * Int8Tile::kSteps + k) * 64 + r * 4, tile.block(b)[k * n_tokens + t]);
                    sum = std::fma(float(int32_t(whole)), tile.factor(b)[t], sum);
                }
                *sums++ = sum * linear.scale[panel * kPanelRows + r];
            }
        }
    }
}

void multiply_nf4(const Linear& linear, const void* memory, int n_tokens, int64_t first, int64_t n_panels,
                  float* sums) {
    uint8_t levels[16];
    for (int i = 0; i < 16; ++i) levels[i] = uint8_t(kNf4Levels[i] + 128);
    for (int64_t panel = first; panel < first + n_panels; ++panel, sums += n_tokens * kPanelRows) {
        const uint8_t* weight = linear.weight + panel * panel_bytes(linear);
        for (int i = 0; i < n_tokens * kPanelRows; ++i) sums[i] = 0;
        const int32_t* block = static_cast<const int32_t*>(memory);
        for (int64_t b = 0; b < Nf4Tile::blocks(linear); ++b, weight += kNf4BlockBytes) {
            const int32_t* start = block + 32 * n_tokens;
            const float* factor = reinterpret_cast<const float*>(start + n_tokens);
            for (int t = 0; t < n_tokens; ++t) {
                for (int r = 0; r < kPanelRows; ++r) {
                    uint32_t of_high = 0, of_low = 0;
                    for (int k = 0; k < 16; ++k) {
                        uint8_t values[4];
                        for (int c = 0; c < 4; ++c) {
                            const uint8_t byte = weight[k / 2 * 64 + r * 4 + c];
                            values[c] = levels[k % 2 ? byte >> 4 : byte & 15];
                        }
                        const int32_t* digits = block + (k * n_tokens + t) * 2;
                        of_high += dot4(values, digits[0]);
                        of_low += dot4(values, digits[1]);
                    }
                    const float scale = load<float>(weight + 512 + r * 4) * factor[t];
                    const int32_t whole = int32_t(of_high * 254 + of_low + uint32_t(start[t]));
                    float& sum = sums[t * kPanelRows + r];
                    sum = std::fma(float(whole), scale, sum);
                }
            }
            block += Nf4Tile::kWords * n_tokens;
        }
    }
}

// -- floats --------------------------------------------------------------------------------------------------

int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

void prepare_float(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* memory) {
    float* columns = static_cast<float*>(memory);
    for (int64_t k = 0; k < even(linear.n_in); ++k)
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
        case Format::INT8: return Int8Tile::bytes(linear, n_tokens);
        case Format::NF4: return Nf4Tile::bytes(linear, n_tokens);
        default: return size_t(even(linear.n_in)) * n_tokens * 4;
    }
}

void prepare(const Linear& linear, const float* x, int64_t x_stride, int n_tokens, void* tile) {
    const auto run = linear.format == Format::INT8  ? prepare_int8<Scalar>
                     : linear.format == Format::NF4 ? prepare_nf4<Scalar>
                                                    : prepare_float;
    run(linear, x, x_stride, n_tokens, tile);
}

void multiply(const Linear& linear, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool,
              float* sums) {
    const auto run = linear.format == Format::INT8  ? multiply_int8
                     : linear.format == Format::NF4 ? multiply_nf4
                                                    : multiply_float;
    run(linear, tile, n_tokens, first, n_panels, sums);
}

}  // namespace

const Kernels scalar_kernels = {"scalar", tile_bytes, prepare, multiply, gate_by};

}  // namespace petalite
