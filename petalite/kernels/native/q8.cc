// The wire codec q8, value for value that of kernels/dynamic8.py; and whether all values are finite.
//
// Plain code: most of the time goes into looking up a byte for each value, which no instruction set does faster.
#include <cmath>

#include "common.h"
#include "half.h"

namespace petalite {
namespace {

constexpr int kBlock = 64;
constexpr float kSteps = 32767.0f, kMiddle = 32768.5f, kLargestScale = 65504.0f, kRoundUp = 1.0009765625f;
constexpr uint16_t kNan = 0x7e00;

// Codes of `n` ≤ 64 values, and their scale as float16.
uint16_t encode_block(const float* x, int n, const uint8_t* nearest, uint8_t* codes) {
    int32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t bits = int32_t(bits_of_float(x[i]) & 0x7fffffffu);
        largest = largest < bits ? bits : largest;
    }
    const bool finite = largest < 0x7f800000;
    uint16_t scale = kNan;
    float inverse = 0;
    if (finite) {
        const float raised = float_of_bits(uint32_t(largest)) * kRoundUp;
        scale = half_of_float(raised < kLargestScale ? raised : kLargestScale);
        inverse = scale ? kSteps / half_to_float(scale) : 0.0f;
    }
    int32_t steps[kBlock];
    for (int i = 0; i < n; ++i) {
        float value = x[i] * inverse;
        value = value < -kSteps ? -kSteps : value;  // the scale may be less than the largest value
        value = value > kSteps ? kSteps : value;
        steps[i] = int32_t((finite ? value : 0.0f) + kMiddle);
    }
    for (int i = 0; i < n; ++i) codes[i] = nearest[steps[i]];
    return scale;
}

}  // namespace
}  // namespace petalite

using namespace petalite;

// x (rows, width) float32 → codes (rows, width) and scales (rows, ceil(width / 64)) float16; strides in elements.
// `nearest`: code by step, 65536 entries.
PETALITE_API void petalite_q8_encode(const float* x, int64_t rows, int64_t width, int64_t x_stride,
                                     const uint8_t* nearest, uint8_t* codes, int64_t codes_stride, uint16_t* scales,
                                     int64_t scales_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t begin = 0; begin < width; begin += kBlock) {
            const int n = int(width - begin < kBlock ? width - begin : kBlock);
            scales[row * scales_stride + begin / kBlock] =
                encode_block(x + row * x_stride + begin, n, nearest, codes + row * codes_stride + begin);
        }
    }
}

// The way back; y (rows, width) float32. `levels`: value by code, 256 entries.
PETALITE_API void petalite_q8_decode(const uint8_t* codes, int64_t rows, int64_t width, int64_t codes_stride,
                                     const uint16_t* scales, int64_t scales_stride, const float* levels, float* y,
                                     int64_t y_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t begin = 0; begin < width; begin += kBlock) {
            const int64_t n = width - begin < kBlock ? width - begin : kBlock;
            const float scale = half_to_float(scales[row * scales_stride + begin / kBlock]);
            const uint8_t* from = codes + row * codes_stride + begin;
            float* to = y + row * y_stride + begin;
            for (int64_t i = 0; i < n; ++i) to[i] = levels[from[i]] * scale;
        }
    }
}

namespace {

// No value's exponent is all ones. Looks at pieces that fit a cache, so that it ends soon after the first that is not.
template <typename T>
bool finite(const T* values, int64_t n, T exponent) {
    constexpr int64_t kPiece = 4096;
    for (int64_t begin = 0; begin < n; begin += kPiece) {
        const int64_t end = begin + kPiece < n ? begin + kPiece : n;
        T bad = 0;
        for (int64_t i = begin; i < end; ++i) bad |= T((values[i] & exponent) == exponent);
        if (bad) return false;
    }
    return true;
}

}  // namespace

// Whether n contiguous values in one of the float formats hold neither NaN nor infinity.
PETALITE_API int32_t petalite_finite(int32_t format, const void* values, int64_t n) {
    switch (Format(format)) {
        case Format::F32: return finite(static_cast<const uint32_t*>(values), n, 0x7f800000u);
        case Format::BF16: return finite(static_cast<const uint16_t*>(values), n, uint16_t(0x7f80));
        default: return finite(static_cast<const uint16_t*>(values), n, uint16_t(0x7c00));
    }
}
