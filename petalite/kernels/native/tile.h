// How `prepare` lays out the tokens of a tile; the same for all instruction sets where the sums are of whole numbers.
//
// INT8: int32 columns[n_in / 4 rounded up][tokens][2], four int8 inputs of one digit each, high then low;
//       int32 fine[n_fine / 4 rounded up][tokens], the high digits of the outlier columns;
//       int32 offset[tokens][2], 128 times the sum of all digits that a product adds up; float step[tokens].
// NF4:  for each block of 64 inputs: int32 columns[16][tokens][2]; int32 offset[tokens]; float step[tokens].
// F32, F16: float columns[n_in rounded up to even][tokens]. BF16: as F32 or, where products take bfloat16, int32
//       columns[n_in / 2 rounded up][tokens], two inputs each.
#pragma once

#include "common.h"

namespace petalite {

struct Int8Tile {
    int32_t* columns;
    int32_t* fine;
    int32_t* offset;
    float* step;
    int64_t n_columns, n_fine;  // in fours

    Int8Tile(const Linear& linear, const void* tile, int n_tokens)
        : n_columns((int64_t(linear.n_in) + 3) / 4), n_fine((int64_t(linear.n_fine) + 3) / 4) {
        columns = static_cast<int32_t*>(const_cast<void*>(tile));
        fine = columns + n_columns * n_tokens * 2;
        offset = fine + n_fine * n_tokens;
        step = reinterpret_cast<float*>(offset + n_tokens * 2);
    }

    static size_t bytes(const Linear& linear, int n_tokens) {
        const int64_t n_columns = (int64_t(linear.n_in) + 3) / 4, n_fine = (int64_t(linear.n_fine) + 3) / 4;
        return size_t(n_columns * 2 + n_fine + 3) * n_tokens * 4;
    }
};

struct Nf4Tile {
    static constexpr int kWords = 16 * 2 + 2;  // of one block, for each token

    static int64_t blocks(const Linear& linear) { return panel_bytes(linear) / kNf4BlockBytes; }
    static size_t bytes(const Linear& linear, int n_tokens) {
        return size_t(blocks(linear)) * kWords * n_tokens * 4;
    }
};

// The inputs (n ≤ 64) that one block of an nf4 weight meets, of one token: its own, or those of outlier columns.
struct Nf4Inputs {
    const float* values;
    int64_t n;
    float gathered[kNf4Block];

    Nf4Inputs(const Linear& linear, const float* x, int64_t block) : values(x + block * kNf4Block) {
        const int64_t begin = block * kNf4Block, after = begin - round_up(linear.n_in, kNf4Block);
        n = (after < 0 ? linear.n_in - begin : linear.n_fine - after);
        if (n > kNf4Block) n = kNf4Block;
        if (after < 0) return;
        for (int64_t i = 0; i < n; ++i) gathered[i] = x[linear.fine_columns[after + i]];
        values = gathered;
    }
    Nf4Inputs(const Nf4Inputs&) = delete;
};

}  // namespace petalite
