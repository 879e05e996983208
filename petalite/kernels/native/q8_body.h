// One block of q8 each way. Included once for every instruction set, each time in a namespace of its own, and left to
// the compiler to vectorize.

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

// `n` ≤ 64 values back from their codes.
void decode_block(const uint8_t* codes, int64_t n, uint16_t scale, const float* levels, float* y) {
    const float factor = half_to_float(scale);
    for (int64_t i = 0; i < n; ++i) y[i] = levels[codes[i]] * factor;
}
