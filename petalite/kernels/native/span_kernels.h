// What a span computes beside its linear layers, of which each instruction set has its own table.
//
// All of it is float32 in a fixed order per token: a token's numbers depend on its own row alone, not on how many
// tokens came with it, nor on workers, nor (fused multiply-add being everywhere) on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace petalite {

constexpr int kChunkKeys = 256;  // keys whose weights are summed at once; chunks are merged in ascending order
constexpr int kTileKeys = 64;    // of a chunk, transposed at a time
constexpr int kQueryRows = 64;   // queries (tokens × heads that share a key head) of one piece of attention

// The keys and values of one key head of one cached row, each (tokens, head_dim) in `format`.
struct CachedHead {
    const void* keys;
    const void* values;
    Format format;
    int32_t head_dim;
    int32_t group;        // query heads that share it
    int64_t window;       // how many tokens back a token sees, itself included; 0: all
    const float* slopes;  // ALiBi's, of each of the group; or null
};

// `n_tokens` consecutive tokens from `position` on: n_tokens × group queries of `head_dim`, token by token, already
// divided by √head_dim.
struct Queries {
    const float* rows;
    int64_t position;
    int32_t n_tokens;
};

// What attention over some keys gives, of each query: the largest logit, the sum of exp(logit - largest), and the
// values so weighted, `padded(head_dim)` floats each. All keys: weighted / sum.
struct Attended {
    float* largest;
    float* sum;
    float* weighted;
};

inline int64_t padded(int64_t head_dim) { return round_up(head_dim, 16); }

// Floats that `attend` works in, for so many queries.
inline int64_t attend_floats(int64_t n_rows, int64_t head_dim) {
    return n_rows * kChunkKeys + kTileKeys * (head_dim + padded(head_dim));
}

struct SpanKernels {
    const char* name;

    // out = x / √(Σx² + n·eps) · weight; the weight holds a factor √n. In place where out is x.
    void (*rms_norm)(const float* x, const float* weight, int64_t n, float n_eps, float* out);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out);
    void (*gelu)(float* x, int64_t n);  // in place, by tanh

    // One head of one token in place: `head_dim` / 2 pairs as complex numbers times `rotation`.
    void (*rotate)(float* head, const float* rotation, int64_t head_dim);
    // Into a cache of `format`.
    void (*narrow)(const float* x, int64_t n, Format format, void* out);

    // One chunk of keys, those from chunk · kChunkKeys on. Queries that see none of it get -max, 0, 0.
    void (*attend)(const CachedHead& head, const Queries& queries, int64_t chunk, const Attended& out, float* work);
    // `sum` and the chunk after those it holds → `sum`.
    void (*merge)(const Attended& chunk, int64_t n_rows, int64_t head_dim, const Attended& sum);
    // Query r's result to out + (r / group) · stride + (r % group) · head_dim.
    void (*finish)(const Attended& all, int64_t n_rows, int64_t head_dim, int64_t group, float* out, int64_t stride);
};

// Those of the instruction set in use.
const SpanKernels& span_kernels();

extern const SpanKernels scalar_span_kernels;
#if defined(__x86_64__)
extern const SpanKernels avx2_span_kernels, avx512_span_kernels;
#elif defined(__aarch64__)
extern const SpanKernels neon_span_kernels;
#endif

}  // namespace petalite
