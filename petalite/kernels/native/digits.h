// Activations in int8 digits: what every instruction set must give, in scalar code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace petalite {

constexpr float kSmallest = 1e-30f;  // step: keeps zeros from dividing by zero; as in kernels/int8.py
constexpr float kDigit = 254.0f;
constexpr float kNf4Unit = 1 / 124.11f;  // what levels in one digit count in

// The 16 levels of nf4 (quantized.py) in one digit, as the product of bytes takes them: within 0.0037, by mean 0.0018,
// where what nf4 itself misses is 0.036. Of all scales the one that misses least.
constexpr int8_t kNf4Levels[16] = {-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124};

inline uint32_t magnitude_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x7fffffffu;
}

// One digit's worth of the token or block whose largest magnitude has these bits. NaN where that is not finite: all
// digits are then zero, and the result NaN.
inline float step_of(uint32_t largest_bits) {
    if (largest_bits > 0x7f7fffffu) return NAN;
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    const float step = largest * (1.0f / 127);
    return step > kSmallest ? step : kSmallest;
}

// The inputs but for outlier columns have one digit each, in blocks of 64. A block's step is a whole number of
// units, of which the largest of all these inputs takes kMultiples: so sums of all blocks are whole numbers of units.
constexpr float kMultiples = 128.0f;

inline float unit_of(uint32_t largest_bits) { return step_of(largest_bits) / kMultiples; }

// How many units a block's step is, when its largest magnitude has these bits. 1 where `unit` is NaN.
inline float multiple_of(uint32_t largest_bits, float unit) {
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    const float found = std::ceil(largest / (unit * 127));
    return found >= 1 ? (found <= kMultiples ? found : kMultiples) : 1.0f;
}

}  // namespace petalite
