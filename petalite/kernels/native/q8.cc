// The wire codec q8, value for value that of kernels/dynamic8.py; and whether all values are finite.
#include <cmath>

#include "common.h"
#include "half.h"
#include "kernels.h"
#include "target.h"

namespace petalite {
namespace {

constexpr int kBlock = 64;
constexpr float kSteps = 32767.0f, kMiddle = 32768.5f, kLargestScale = 65504.0f, kRoundUp = 1.0009765625f;
constexpr uint16_t kNan = 0x7e00;

namespace plain {
#include "q8_body.h"
}
#if defined(__x86_64__)
PETALITE_TARGET_BEGIN("avx2")
namespace avx2 {
#include "q8_body.h"
}
PETALITE_TARGET_END
PETALITE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#include "q8_body.h"
}
PETALITE_TARGET_END
#endif

struct Blocks {
    decltype(&plain::encode_block) encode;
    decltype(&plain::decode_block) decode;
};

Blocks blocks() {
#if defined(__x86_64__)
    if (&kernels() == &avx512_kernels) return {avx512::encode_block, avx512::decode_block};
    if (&kernels() == &avx2_kernels) return {avx2::encode_block, avx2::decode_block};
#endif
    return {plain::encode_block, plain::decode_block};
}

}  // namespace
}  // namespace petalite

using namespace petalite;

// x (rows, width) float32 → codes (rows, width) and scales (rows, ceil(width / 64)) float16; strides in elements.
// `nearest`: code by step, 65536 entries.
PETALITE_API void petalite_q8_encode(const float* x, int64_t rows, int64_t width, int64_t x_stride,
                                     const uint8_t* nearest, uint8_t* codes, int64_t codes_stride, uint16_t* scales,
                                     int64_t scales_stride) {
    const auto encode = blocks().encode;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t begin = 0; begin < width; begin += kBlock) {
            const int n = int(width - begin < kBlock ? width - begin : kBlock);
            scales[row * scales_stride + begin / kBlock] =
                encode(x + row * x_stride + begin, n, nearest, codes + row * codes_stride + begin);
        }
    }
}

// The way back; y (rows, width) float32. `levels`: value by code, 256 entries.
PETALITE_API void petalite_q8_decode(const uint8_t* codes, int64_t rows, int64_t width, int64_t codes_stride,
                                     const uint16_t* scales, int64_t scales_stride, const float* levels, float* y,
                                     int64_t y_stride) {
    const auto decode = blocks().decode;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t begin = 0; begin < width; begin += kBlock) {
            const int64_t n = width - begin < kBlock ? width - begin : kBlock;
            decode(codes + row * codes_stride + begin, n, scales[row * scales_stride + begin / kBlock], levels,
                   y + row * y_stride + begin);
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
