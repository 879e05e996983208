// Weights into panels and back; see common.h for the layout. Called with the team's threads idle.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "short.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
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

// Some rows of one panel, at their places there.
struct PanelRows {
    const uint8_t* in[kPanelRows];
    int place[kPanelRows];
    int n = 0;
};

// Four words of four rows to four steps of the panel, where they are neighbours: three times as fast as one by one.
void pack_square(const uint8_t* const* in, uint32_t* out, uint32_t flip) {
#if defined(__SSE2__)
    const auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[r])); };
    const auto put = [&](int step, __m128i words) {
        words = _mm_xor_si128(words, _mm_set1_epi32(int(flip)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + step * kPanelRows), words);
    };
    const __m128i a = _mm_unpacklo_epi32(row(0), row(1)), b = _mm_unpacklo_epi32(row(2), row(3));
    const __m128i c = _mm_unpackhi_epi32(row(0), row(1)), d = _mm_unpackhi_epi32(row(2), row(3));
    put(0, _mm_unpacklo_epi64(a, b)), put(1, _mm_unpackhi_epi64(a, b));
    put(2, _mm_unpacklo_epi64(c, d)), put(3, _mm_unpackhi_epi64(c, d));
#else
    for (int r = 0; r < 4; ++r) {
        uint32_t words[4];
        std::memcpy(words, in[r], 16);
        for (int step = 0; step < 4; ++step) out[step * kPanelRows + r] = words[step] ^ flip;
    }
#endif
}

// Item i of a row to step i of the panel, at the row's place; each item is xored with `flip`. Of items that the row
// does not fill the rest is zero.
template <typename T>
void pack_rows(const PanelRows& rows, int64_t row_bytes, T* out, T flip) {
    constexpr int64_t kSize = sizeof(T), kLine = 64 / kSize;
    const int64_t n_whole = row_bytes / kSize, n_rest = row_bytes % kSize;
    for (int64_t begin = 0; begin < n_whole; begin += kLine) {  // a line of each row, so that lines are written whole
        const int64_t end = std::min(begin + kLine, n_whole);
        for (int r = 0; r < rows.n; ++r) {
            int64_t i = begin;
            if constexpr (kSize == 4) {
                if (r + 4 <= rows.n && rows.place[r + 3] == rows.place[r] + 3 && end - begin == kLine) {
                    for (; i < end; i += 4) {
                        const int64_t at = i * kSize;
                        const uint8_t* in[] = {rows.in[r] + at, rows.in[r + 1] + at, rows.in[r + 2] + at, rows.in[r + 3] + at};
                        pack_square(in, out + i * kPanelRows + rows.place[r], flip);
                    }
                    r += 3;
                }
            }
            for (; i < end; ++i) {
                T item;
                std::memcpy(&item, rows.in[r] + i * kSize, kSize);
                out[i * kPanelRows + rows.place[r]] = item ^ flip;
            }
        }
    }
    for (int r = 0; n_rest && r < rows.n; ++r) {
        T item = 0;
        std::memcpy(&item, rows.in[r] + n_whole * kSize, size_t(n_rest));
        out[n_whole * kPanelRows + rows.place[r]] = item ^ flip;
    }
}

// All rows of a weight; rows beyond its last, which fill up the panel, are zero.
void pack_words(const void* rows, int64_t n_rows, int64_t row_bytes, uint8_t* panels, int64_t stride, uint32_t flip) {
    for (int64_t first = 0; first < n_rows; first += kPanelRows) {
        auto* out = reinterpret_cast<uint32_t*>(panels + first / kPanelRows * stride);
        PanelRows here;
        for (; here.n < std::min<int64_t>(kPanelRows, n_rows - first); ++here.n) {
            here.in[here.n] = static_cast<const uint8_t*>(rows) + (first + here.n) * row_bytes;
            here.place[here.n] = here.n;
        }
        if (here.n < kPanelRows) std::fill_n(out, (row_bytes + 3) / 4 * kPanelRows, flip);
        pack_rows(here, row_bytes, out, flip);
    }
}

constexpr uint32_t kCodeFlip = 0x80808080u;  // adds 128 to four int8 codes

}  // namespace
}  // namespace petalite

using namespace petalite;

// codes (n_out, n_columns) int8 in the order of the panels, contiguous → panels.
PETALITE_API void petalite_pack_int8(const int8_t* codes, int64_t n_out, int64_t n_columns, uint8_t* panels) {
    pack_words(codes, n_out, n_columns, panels, (n_columns + 3) / 4 * 64, kCodeFlip);
}

PETALITE_API void petalite_unpack_int8(const uint8_t* panels, int64_t n_out, int64_t n_columns, int8_t* codes) {
    const int64_t size = (n_columns + 3) / 4 * 64;
    over_panels(n_out, [&](int64_t panel, int r, int64_t row) {
        const uint8_t* in = panels + panel * size + r * 4;
        for (int64_t k = 0; row < n_out && k < n_columns; ++k)
            codes[row * n_columns + k] = int8_t(in[k / 4 * 64 + k % 4] - 128);
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

// Rows (…, n_in), contiguous, in one of the float formats: row from[i] becomes row to[i] of the panels, for i below `n`;
// `to` ascends. What fills up the last panel is the caller's.
PETALITE_API void petalite_pack_float(int32_t format, const void* rows, int64_t n, int64_t n_in, const int64_t* from,
                                      const int64_t* to, void* panels) {
    const int64_t size = panel_bytes(Format(format), n_in, 0);
    const int64_t row_bytes = n_in * (Format(format) == Format::F32 ? 4 : 2);
    for (int64_t i = 0; i < n;) {
        const int64_t panel = to[i] / kPanelRows;
        uint8_t* out = static_cast<uint8_t*>(panels) + panel * size;
        PanelRows here;
        for (; here.n < kPanelRows && i < n && to[i] / kPanelRows == panel; ++i, ++here.n) {
            here.in[here.n] = static_cast<const uint8_t*>(rows) + from[i] * row_bytes;
            here.place[here.n] = int(to[i] % kPanelRows);
        }
        if (Format(format) == Format::F16) {
            auto* halves = reinterpret_cast<uint16_t*>(out);
            pack_rows<uint16_t>(here, row_bytes, halves, 0);
            for (int r = 0; n_in % 2 && r < here.n; ++r) halves[n_in * kPanelRows + here.place[r]] = 0;
        } else {
            pack_rows<uint32_t>(here, row_bytes, reinterpret_cast<uint32_t*>(out), 0);
        }
    }
}

PETALITE_API void petalite_unpack_float(int32_t format, const void* panels, int64_t n_out, int64_t n_in, int64_t n_fine,
                                        void* weight) {
    if (Format(format) == Format::BF12) {
        const int64_t size = panel_bytes(Format::BF12, n_in, n_fine);
        std::vector<uint16_t> numbers(size_t(short_blocks(n_in) * kShortNumbers));
        for (int64_t first = 0; first < n_out; first += kPanelRows) {
            const ShortPanel panel(static_cast<const uint8_t*>(panels) + first / kPanelRows * size, n_in);
            widen_short(panel, n_in, numbers.data());
            panel.each_exception([&](int64_t k, int row, uint16_t value) {
                place(Format::BF16, numbers.data(), k, row) = value;
            });
            unpack(Format::BF16, numbers.data(), std::min<int64_t>(kPanelRows, n_out - first), n_in,
                   static_cast<uint16_t*>(weight) + first * n_in);
        }
    } else if (Format(format) == Format::F32)
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

// A sum over the 8-byte words of `bytes` and their places, the first being `place`; the last is filled up with zeros. Sums
// of parts that begin at their places add up to that of the whole, modulo 2^64. One changed word always changes it;
// it finds accidents, not forgeries.
PETALITE_API uint64_t petalite_checksum(const void* bytes, int64_t n_bytes, uint64_t place) {
    const auto* in = static_cast<const uint8_t*>(bytes);
    const auto mixed = [](uint64_t word, uint64_t at) {  // one to one in `word`
        word = (word ^ at * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
        return (word ^ word >> 32) * 0x94d049bb133111ebu;
    };
    uint64_t sum = 0, word;
    const int64_t n_words = n_bytes / 8;
    for (int64_t i = 0; i < n_words; ++i) {
        std::memcpy(&word, in + i * 8, 8);
        sum += mixed(word, place + uint64_t(i));
    }
    if (n_bytes % 8) {
        word = 0;
        std::memcpy(&word, in + n_words * 8, size_t(n_bytes % 8));
        sum += mixed(word, place + uint64_t(n_words));
    }
    return sum;
}
