// Activations in two int8 digits: what every instruction set must give, in scalar code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace petalite {

constexpr float kSmallest = 1e-30f;  // keeps zeros from dividing by zero; as in kernels/int8.py
constexpr float kDigit = 254.0f;
constexpr float kNf4Unit = 1 / (124.11f * 254);  // what a product of a level and both digits of an input counts in

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
    return std::fma(largest, 1.0f / 127, kSmallest);
}

struct Digits {
    int8_t high, low;
};

inline Digits digits_of(float x, float step) {
    if (std::isnan(step)) return {0, 0};
    const float scaled = x / step, high = std::nearbyint(scaled);
    return {int8_t(high), int8_t(std::nearbyint((scaled - high) * kDigit))};
}

}  // namespace petalite
