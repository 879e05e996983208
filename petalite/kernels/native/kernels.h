// What each instruction set implements; `kernels()` is the table of the one in use.
#pragma once

#include "common.h"

namespace petalite {

constexpr int kMaxTile = 12;  // tokens of one product

// Activations of up to kMaxTile tokens, made ready for the products of one format: `prepare` writes them, `multiply`
// reads them, both of the same table. `tile_bytes` is their size.
struct Kernels {
    const char* name;

    size_t (*tile_bytes)(const Linear&, int n_tokens);
    void (*prepare)(const Linear&, const float* x, int64_t x_stride, int n_tokens, void* tile);

    // sums (n_panels, n_tokens, 16): products of `n_panels` panels from `first` on with every token of the tile,
    // scaled, without bias. `once`: no other tile meets these weights soon.
    void (*multiply)(const Linear&, const void* tile, int n_tokens, int64_t first, int64_t n_panels, bool once,
                     float* sums);

    // out = silu(gate) · up, 16 of each.
    void (*gate)(const float* gates, const float* ups, float* out);

    // Whether BF12 is at least as fast as BF16 for few tokens, where memory sets the time.
    bool short_serves;
};

const Kernels& kernels();

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels, i8mm_kernels;
#endif

}  // namespace petalite
