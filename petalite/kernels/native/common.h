// What every native file shares: a linear layer as plain data, and how its weights lie in memory.
//
// Weights lie in panels of 16 output rows, zero rows added to the last. A panel runs along the inputs, so that a
// product reads one stream from end to end; 64 bytes are one step of it, whatever the instruction set:
//   F32   16 rows × 1 input             BF16  16 rows × 2 inputs (row r: inputs 2i, 2i + 1)
//   F16   16 rows × 2 inputs: the 16 values of input 2i, then those of 2i + 1
//   BF12  BF16 in three quarters of the room, the same numbers; see short.h
//   INT8  16 rows × 4 inputs, a byte each, code + 128. Inputs in the order of `columns`: first the outlier columns (64 at most),
//         filled up to whole steps, after each step its fine codes; then the others.
//   NF4   16 rows × 8 inputs: row r's byte c holds the code of input 8i + c (lower half) and of 8i + 4 + c. After
//         each 64 inputs, the 16 rows' scales of that block as float32: 576 bytes a block. Inputs in the order of `columns`:
//         the outlier columns, once more these for their second codes, and the others, each filled up to whole blocks.
// Inputs are filled up with zeros to whole steps. See quantized.py for what codes mean.
#pragma once

#include <cstddef>
#include <cstdint>

namespace petalite {

constexpr int kPanelRows = 16;
constexpr int kNf4Block = 64;
constexpr int kNf4BlockBytes = kPanelRows * kNf4Block / 2 + kPanelRows * 4;

// See short.h: bytes before a panel's blocks, inputs and bytes of a block, bytes of an exception.
constexpr int64_t kShortHeader = 64, kShortInputs = 8, kShortBlock = 192, kShortException = 8;

enum class Format : int32_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, NF4 = 4, BF12 = 5 };

// Whether products are of whole numbers.
constexpr bool has_digits(Format format) { return format == Format::INT8 || format == Format::NF4; }

// y (T, n_out) = x (T, n_in) · Wᵀ + bias. Filled in by Python (native/linears.py); nothing here is owned.
struct Linear {
    Format format;
    int32_t n_out, n_in;
    int32_t n_fine;          // INT8, NF4: outlier columns, which have a second digit or code. BF12: see short.h
    const uint8_t* weight;   // panels, `panel_bytes` each
    const float* scale;      // INT8: of each row, filled up to whole panels. Else null
    const int32_t* columns;  // INT8, NF4: (n_in), the outlier columns, then the others, each < n_in. Else null
    const float* bias;       // (n_out), or null
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline int64_t panel_count(const Linear& linear) { return (int64_t(linear.n_out) + kPanelRows - 1) / kPanelRows; }

inline int64_t panel_bytes(Format format, int64_t n_in, int64_t n_fine) {
    switch (format) {
        case Format::F32: return n_in * 64;
        case Format::BF16:
        case Format::F16: return (n_in + 1) / 2 * 64;
        case Format::INT8: return ((n_fine + 3) / 4 * 2 + (n_in - n_fine + 3) / 4) * 64;
        case Format::NF4:
            return (2 * round_up(n_fine, kNf4Block) + round_up(n_in - n_fine, kNf4Block)) / kNf4Block * kNf4BlockBytes;
        case Format::BF12:
            return kShortHeader + (n_in + kShortInputs - 1) / kShortInputs * kShortBlock + round_up(n_fine * kShortException, 64);
    }
    return 0;
}

inline int64_t panel_bytes(const Linear& linear) { return panel_bytes(linear.format, linear.n_in, linear.n_fine); }

}  // namespace petalite

#define PETALITE_API extern "C" __attribute__((visibility("default")))
