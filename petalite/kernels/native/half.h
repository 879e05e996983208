// float16 in scalar code.
#pragma once

#include <cstdint>
#include <cstring>

namespace petalite {

inline float float_of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return float_of_bits(sign | bits_of_float(float(mantissa) * 0x1p-24f));
    return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// To the nearest, ties to even; for 0 ≤ x ≤ 65504.
inline uint16_t half_of_float(float x) {
    const uint32_t bits = bits_of_float(x);
    if (bits < 0x38800000u) return uint16_t(bits_of_float(x + 0.5f) - 0x3f000000u);  // subnormal: the sum rounds
    return uint16_t((bits + 0xfff + (bits >> 13 & 1) - 0x38000000u) >> 13);
}

}  // namespace petalite
