#define PETALITE_ISA span_scalar
#include "span_body.h"

namespace petalite {

const SpanKernels scalar_span_kernels = {
    "scalar",
    span_scalar::rms_norm,
    span_scalar::layer_norm,
    span_scalar::gelu,
    span_scalar::rotate,
    span_scalar::narrow,
    span_scalar::attend,
    span_scalar::merge,
    span_scalar::finish,
};

}  // namespace petalite
