// How `prepare` lays out the tokens of a tile; the same for all instruction sets where the sums are of whole numbers.
//
// INT8: the inputs in the order of the weights' columns. Of the outlier columns int32 words[n_fine / 4 rounded up][tokens][2],
//       four int8 inputs of one digit each, high then low; int32 start[tokens]; float factor[tokens]. Then, of each block of
//       64 others, int32 words[16, fewer in the last][tokens]; int32 start[tokens]; float factor[tokens].
//       `start` takes back the 128 that codes have in excess: sums begin there. Times `factor` they are in the inputs' scale.
// NF4:  for each block of 64 inputs: int32 words[16][tokens][2]; int32 start[tokens]; float factor[tokens].
// F32, F16: float columns[n_in rounded up to even][tokens]. BF16: as F32 or, where products take bfloat16, int32
//       columns[n_in / 2 rounded up][tokens], two inputs each.
#pragma once

#include "common.h"

namespace petalite {

struct Int8Tile {
    static constexpr int kSteps = 16;  // of a whole block

    int32_t* words;
    int64_t n_fine, n_rest;  // steps of four inputs
    int n_tokens;

    Int8Tile(const Linear& linear, const void* tile, int n_tokens)
        : words(static_cast<int32_t*>(const_cast<void*>(tile))),
          n_fine((int64_t(linear.n_fine) + 3) / 4),
          n_rest((int64_t(linear.n_in) - linear.n_fine + 3) / 4),
          n_tokens(n_tokens) {}

    int64_t blocks() const { return (n_rest + kSteps - 1) / kSteps; }
    int64_t steps(int64_t block) const { return n_rest - block * kSteps < kSteps ? n_rest - block * kSteps : kSteps; }
    int32_t* fine() const { return words; }
    int32_t* fine_start() const { return fine() + n_fine * 2 * n_tokens; }
    float* fine_factor() const { return reinterpret_cast<float*>(fine_start() + n_tokens); }
    int32_t* block(int64_t block) const { return fine_start() + (2 + block * (kSteps + 2)) * n_tokens; }
    int32_t* start(int64_t block) const { return this->block(block) + steps(block) * n_tokens; }
    float* factor(int64_t block) const { return reinterpret_cast<float*>(start(block) + n_tokens); }

    static size_t bytes(const Linear& linear, int n_tokens) {
        const Int8Tile tile(linear, nullptr, n_tokens);
        return size_t(tile.n_fine * 2 + 2 + tile.n_rest + tile.blocks() * 2) * n_tokens * 4;
    }
};

struct Nf4Tile {
    static constexpr int kSteps = 16;               // of a block
    static constexpr int kWords = kSteps * 2 + 2;  // of a block, for each token

    static int64_t blocks(const Linear& linear) { return panel_bytes(linear) / kNf4BlockBytes; }
    static size_t bytes(const Linear& linear, int n_tokens) {
        return size_t(blocks(linear)) * kWords * n_tokens * 4;
    }
};

}  // namespace petalite
