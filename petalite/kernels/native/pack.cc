// Weights into panels and back; see common.h for the layout. Called with the team's threads idle.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace petalite {
namespace {

// move(panel, its row, row of the weight) for every row, those that fill up the last panel included.
template <typename Move>
void over_panels(int64_t n_out, Move move) {
    for (int64_t row = 0; row < round_up(n_out, kPanelRows); ++row) move(row / kPanelRows, int(row % kPanelRows), row);
}

// Rows of `row_bytes` in words of 4 bytes, word w of the panel's row r to step w, place r; bytes that fill up the last
// word are zero, and so are rows beyond the last. Each word is xored with `flip`.
void pack_words(const void* rows, int64_t n_rows, int64_t row_bytes, uint8_t* panels, int64_t stride,
                uint32_t flip) {
    const int64_t n_whole = row_bytes / 4, n_rest = row_bytes % 4;
    for (int64_t row = 0; row < round_up(n_rows, kPanelRows); row += kPanelRows) {
        auto* out = reinterpret_cast<uint32_t*>(panels + row / kPanelRows * stride);
        const int n_here = int(std::min<int64_t>(kPanelRows, n_rows - row));
        const auto* in = static_cast<const uint8_t*>(rows) + row * row_bytes;
        if (n_here < kPanelRows) std::fill_n(out, (row_bytes + 3) / 4 * kPanelRows, flip);
        for (int64_t begin = 0; begin < n_whole; begin += 16) {  // a line of each row, so that lines are written whole
            const int64_t end = std::min(begin + 16, n_whole);
            for (int r = 0; r < n_here; ++r) {
                for (int64_t w = begin; w < end; ++w) {
                    uint32_t word;
                    std::memcpy(&word, in + r * row_bytes + w * 4, 4);
                    out[w * kPanelRows + r] = word ^ flip;
                }
            }
        }
        for (int r = 0; n_rest && r < n_here; ++r) {
            uint32_t word = 0;
            std::memcpy(&word, in + r * row_bytes + n_whole * 4, size_t(n_rest));
            out[n_whole * kPanelRows + r] = word ^ flip;
        }
    }
}

constexpr uint32_t kCodeFlip = 0x80808080u;  // adds 128 to four int8 codes

}  // namespace
}  // namespace petalite

using namespace petalite;

// codes (n_out, n_in) int8 and fine codes (n_out, n_fine) int8, contiguous → panels.
PETALITE_API void petalite_pack_int8(const int8_t* codes, const int8_t* fine, int64_t n_out, int64_t n_in,
                                     int64_t n_fine, uint8_t* panels) {
    const int64_t size = panel_bytes(Format::INT8, n_in, n_fine), n_steps = (n_in + 3) / 4;
    pack_words(codes, n_out, n_in, panels, size, kCodeFlip);
    pack_words(fine, n_out, n_fine, panels + n_steps * 64, size, kCodeFlip);
}

PETALITE_API void petalite_unpack_int8(const uint8_t* panels, int64_t n_out, int64_t n_in, int64_t n_fine,
                                       int8_t* codes, int8_t* fine) {
    const int64_t size = panel_bytes(Format::INT8, n_in, n_fine), n_steps = (n_in + 3) / 4;
    over_panels(n_out, [&](int64_t panel, int r, int64_t row) {
        if (row >= n_out) return;
        const uint8_t* in = panels + panel * size + r * 4;
        for (int64_t k = 0; k < n_in; ++k) codes[row * n_in + k] = int8_t(in[k / 4 * 64 + k % 4] - 128);
        for (int64_t c = 0; c < n_fine; ++c)
            fine[row * n_fine + c] = int8_t(in[(n_steps + c / 4) * 64 + c % 4] - 128);
    });
}

// packed (n_out, n_blocks · 32), two codes a byte, the first in the upper half, and scales (n_out, n_blocks) → panels.
PETALITE_API void petalite_pack_nf4(const uint8_t* packed, const float* scales, int64_t n_out, int64_t n_blocks,
                                    uint8_t* panels) {
    over_panels(n_out, [&](int64_t panel, int r, int64_t row) {
        uint8_t* out = panels + panel * n_blocks * kNf4BlockBytes;
        for (int64_t b = 0; b < n_blocks; ++b, out += kNf4BlockBytes) {
            uint8_t codes[kNf4Block];
            float scale = 0;
            std::memset(codes, 7, sizeof codes);  // the level that is zero
            if (row < n_out) {
                const uint8_t* in = packed + (row * n_blocks + b) * 32;
                for (int i = 0; i < 32; ++i) codes[2 * i] = in[i] >> 4, codes[2 * i + 1] = in[i] & 15;
                scale = scales[row * n_blocks + b];
            }
            for (int i = 0; i < 8; ++i)
                for (int c = 0; c < 4; ++c)
                    out[i * 64 + r * 4 + c] = uint8_t(codes[8 * i + c] | codes[8 * i + 4 + c] << 4);
            std::memcpy(out + 512 + r * 4, &scale, 4);
        }
    });
}

PETALITE_API void petalite_unpack_nf4(const uint8_t* panels, int64_t n_out, int64_t n_blocks, uint8_t* packed,
                                      float* scales) {
    over_panels(n_out, [&](int64_t panel, int r, int64_t row) {
        if (row >= n_out) return;
        const uint8_t* in = panels + panel * n_blocks * kNf4BlockBytes;
        for (int64_t b = 0; b < n_blocks; ++b, in += kNf4BlockBytes) {
            uint8_t codes[kNf4Block];
            for (int i = 0; i < 8; ++i)
                for (int c = 0; c < 4; ++c) {
                    const uint8_t byte = in[i * 64 + r * 4 + c];
                    codes[8 * i + c] = byte & 15, codes[8 * i + 4 + c] = byte >> 4;
                }
            uint8_t* out = packed + (row * n_blocks + b) * 32;
            for (int i = 0; i < 32; ++i) out[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
            std::memcpy(scales + row * n_blocks + b, in + 512 + r * 4, 4);
        }
    });
}

namespace {

template <typename T>
T& place(Format format, T* panel, int64_t k, int r) {
    return format == Format::BF16 ? panel[k / 2 * 32 + r * 2 + k % 2] : panel[k * 16 + r];
}

template <typename T>
void unpack(Format format, const T* panels, int64_t n_out, int64_t n_in, T* weight) {
    const int64_t size = panel_bytes(format, n_in, 0) / int64_t(sizeof(T));
    over_panels(n_out, [&](int64_t panel, int r, int64_t row) {
        if (row >= n_out) return;
        for (int64_t k = 0; k < n_in; ++k) weight[row * n_in + k] = place(format, panels + panel * size, k, r);
    });
}

}  // namespace

// weight (n_out, n_in), contiguous, in one of the float formats → panels.
PETALITE_API void petalite_pack_float(int32_t format, const void* weight, int64_t n_out, int64_t n_in, void* panels) {
    const int64_t size = panel_bytes(Format(format), n_in, 0);
    auto* out = static_cast<uint8_t*>(panels);
    if (Format(format) != Format::F16) {
        pack_words(weight, n_out, n_in * (Format(format) == Format::F32 ? 4 : 2), out, size, 0);
        return;
    }
    std::memset(panels, 0, size_t(size * (round_up(n_out, kPanelRows) / kPanelRows)));
    over_panels(n_out, [&](int64_t panel, int r, int64_t row) {
        if (row >= n_out) return;
        auto* to = reinterpret_cast<uint16_t*>(out + panel * size);
        for (int64_t k = 0; k < n_in; ++k)
            place(Format::F16, to, k, r) = static_cast<const uint16_t*>(weight)[row * n_in + k];
    });
}

PETALITE_API void petalite_unpack_float(int32_t format, const void* panels, int64_t n_out, int64_t n_in, void* weight) {
    if (Format(format) == Format::F32)
        unpack(Format::F32, static_cast<const float*>(panels), n_out, n_in, static_cast<float*>(weight));
    else
        unpack(Format(format), static_cast<const uint16_t*>(panels), n_out, n_in, static_cast<uint16_t*>(weight));
}

// Asks for pages of 2 MiB under memory that nothing was written to yet. Without them a product of cold weights waits for
// address translation: a sixth of its time.
PETALITE_API void petalite_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t begin = (uintptr_t(memory) + 4095) / 4096 * 4096, end = (uintptr_t(memory) + uintptr_t(bytes)) / 4096 * 4096;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}
