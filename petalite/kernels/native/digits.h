// Activations in two int8 digits: what every instruction set must give, in scalar code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace petalite {

constexpr float kSmallest = 1e-30f;  // keeps zeros from dividing by zero; as in kernels/int8.py
constexpr float kDigit = 254.0f;
constexpr float kNf4Unit = 1.0f / (127 * 254);  // what a product of both digits of level and input counts in

// The 16 levels of nf4 (quantized.py) in two digits: level ≈ (high + low / 254) / 127, within 1.6e-5.
constexpr int8_t kNf4High[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
constexpr int8_t kNf4Low[16] = {0, -106, 80, -39, -32, -118, 111, 0, 27, 111, 65, -22, -8, 115, -47, 0};

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
