// How `prepare` lays out the tokens of a tile; the same for all instruction sets where the sums are of whole numbers.
//
// INT8, NF4: the inputs in the order of the weights' columns, in blocks of 64. First the outlier columns, of INT8 one block,
//       of NF4 any number: int32 words[16][tokens][2], four int8 inputs of one digit each, high then low; int32 start[tokens];
//       float factor[tokens]. Then the others: int32 words[16][tokens]; int32 start[tokens]; float factor[tokens]. In INT8
//       blocks have no more words than there are inputs.
//       `start` takes back the 128 that codes have in excess: sums begin there. Times `factor` they are in the inputs' scale.
// F32, F16: float columns[n_in rounded up to eight][tokens], zeros behind the last. BF16, BF12: as F32 or, where products
//       take bfloat16, int32 columns[half as many][tokens], two inputs each.
#pragma once

#include "common.h"

namespace petalite {

inline int64_t float_columns(const Linear& linear) { return round_up(linear.n_in, 8); }

struct DigitTile {
    static constexpr int kSteps = 16;  // of a whole block

    int32_t* words;
    int64_t n_fine, n_rest;  // steps of four inputs
    int n_tokens;

    DigitTile(const Linear& linear, const void* tile, int n_tokens)
        : words(static_cast<int32_t*>(const_cast<void*>(tile))),
          n_fine(steps_of(linear.format, linear.n_fine)),
          n_rest(steps_of(linear.format, int64_t(linear.n_in) - linear.n_fine)),
          n_tokens(n_tokens) {}

    int64_t fine_blocks() const { return (n_fine + kSteps - 1) / kSteps; }
    int64_t blocks() const { return (n_rest + kSteps - 1) / kSteps; }
    int fine_steps(int64_t block) const { return in_block(n_fine, block); }
    int steps(int64_t block) const { return in_block(n_rest, block); }

    int32_t* fine(int64_t block) const { return words + block * (kSteps * 2 + 2) * n_tokens; }
    int32_t* fine_start(int64_t block) const { return fine(block) + fine_steps(block) * 2 * n_tokens; }
    float* fine_factor(int64_t block) const { return reinterpret_cast<float*>(fine_start(block) + n_tokens); }
    int32_t* block(int64_t block) const {
        return words + (n_fine * 2 + fine_blocks() * 2 + block * (kSteps + 2)) * n_tokens;
    }
    int32_t* start(int64_t block) const { return this->block(block) + steps(block) * n_tokens; }
    float* factor(int64_t block) const { return reinterpret_cast<float*>(start(block) + n_tokens); }

    static size_t bytes(const Linear& linear, int n_tokens) {
        const DigitTile tile(linear, nullptr, n_tokens);
        return size_t(tile.n_fine * 2 + tile.fine_blocks() * 2 + tile.n_rest + tile.blocks() * 2) * n_tokens * 4;
    }

  private:
    static int64_t steps_of(Format format, int64_t n) {
        return format == Format::NF4 ? round_up(n, kNf4Block) / 4 : (n + 3) / 4;
    }
    static int in_block(int64_t n_steps, int64_t block) {
        return int(n_steps - block * kSteps < kSteps ? n_steps - block * kSteps : kSteps);
    }
};

}  // namespace petalite
