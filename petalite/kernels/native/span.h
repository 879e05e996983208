// One packed step through consecutive transformer blocks, in one run of a team.
#pragma once

#include "common.h"
#include "team.h"

namespace petalite {

// What all blocks of a span have in common. Filled in by Python (native/span.py), as are the structures below;
// nothing in them is owned, and all pointers are to what Python has checked.
struct SpanShape {
    int32_t hidden, inner;                    // E, F
    int32_t n_heads, n_kv_heads, head_dim;    // H, K, D
    Format cache;                             // F32, BF16 or F16
    int32_t gated;                            // the MLP is silu(gate) · up; else gelu
    int32_t residual_after_norm;              // what a norm gave is added to what its branch gives
    float eps;
    const float* slopes;  // ALiBi's, (H); or null
};

struct SpanBlock {
    Linear qkv, output, up, down;  // `up`: gate and up, if gated
    const float* attention_norm;   // (E); with a bias a LayerNorm, else an RMSNorm whose weight holds a factor √E
    const float* attention_norm_bias;
    const float* mlp_norm;
    const float* mlp_norm_bias;
    const float* head_norm;  // (H + K, D) RMSNorms of queries and keys, with a factor √D; or null
    int64_t window;          // how many tokens back a token sees, itself included; 0: all
    int32_t rope;            // whether queries and keys are rotated
};

// Consecutive tokens of one cached row.
struct SpanSegment {
    int64_t position, n_tokens;
    int64_t capacity;     // tokens that the row has room for
    void* const* blocks;  // of each block, its keys and values (2, K, capacity, D) in the cache's format
};

struct SpanCall {
    const SpanShape* shape;
    const SpanBlock* blocks;
    const SpanSegment* segments;  // their tokens lie one after the other; every row occurs once
    int64_t n_blocks, n_segments;
    float* hidden;          // (T, E), in and out
    const float* rotation;  // (positions, D / 2, 2): cosine and sine
    char* scratch;          // 64-byte aligned
    int64_t scratch_bytes;
};

}  // namespace petalite

// Runs the step. Returns 0; or, with nothing done, the bytes of scratch that it needs.
PETALITE_API int64_t petalite_span_step(petalite::Team* team, const petalite::SpanCall* call);
