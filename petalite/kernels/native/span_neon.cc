#if defined(__aarch64__)
#define PETALITE_SIMD_NEON 1
#define PETALITE_ISA span_neon
#include "span_body.h"

namespace petalite {

const SpanKernels neon_span_kernels = {
    "neon",
    span_neon::rms_norm,
    span_neon::layer_norm,
    span_neon::gelu,
    span_neon::rotate,
    span_neon::narrow,
    span_neon::attend,
    span_neon::merge,
    span_neon::finish,
};

}  // namespace petalite

#endif
