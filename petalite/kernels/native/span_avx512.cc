#if defined(__x86_64__)
#include <immintrin.h>  // before the pragma: it chooses targets itself

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif

#define PETALITE_SIMD_AVX512 1
#define PETALITE_ISA span_avx512
#include "span_body.h"

namespace petalite {

const SpanKernels avx512_span_kernels = {
    "avx512",
    span_avx512::rms_norm,
    span_avx512::layer_norm,
    span_avx512::gelu,
    span_avx512::rotate,
    span_avx512::narrow,
    span_avx512::attend,
    span_avx512::merge,
    span_avx512::finish,
};

}  // namespace petalite

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
