// silu(gate) · up of 16 values, the same bits on every machine. Included once for every instruction set, after simd.h.

inline void gate_by(const float* gates, const float* ups, float* out) {
    using namespace PETALITE_ISA;
    const V gate = load(gates);
    const V below = add(splat(1.0f), exponential(sub(splat(0.0f), gate)));
    store(out, mul(div(gate, below), load(ups)));
}
