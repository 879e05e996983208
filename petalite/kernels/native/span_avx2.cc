#if defined(__x86_64__)
#include <immintrin.h>  // before the pragma: it chooses targets itself

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define PETALITE_SIMD_AVX2 1
#define PETALITE_ISA span_avx2
#include "span_body.h"

namespace petalite {

const SpanKernels avx2_span_kernels = {
    "avx2",
    span_avx2::rms_norm,
    span_avx2::layer_norm,
    span_avx2::gelu,
    span_avx2::rotate,
    span_avx2::narrow,
    span_avx2::attend,
    span_avx2::merge,
    span_avx2::finish,
};

}  // namespace petalite

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
