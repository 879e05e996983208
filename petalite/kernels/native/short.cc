// BF16 panels into BF12's; see short.h.
#include "short.h"

#include <algorithm>

#include "kernels.h"

using namespace petalite;

namespace {

constexpr int kPairs = 7;              // of exponents, besides 0 and 1
constexpr int64_t kSampled = 1 << 16;  // numbers that choose them

uint8_t pair_of(uint16_t number) { return uint8_t(number >> 8 & 0x7f); }

bool is_exception(uint16_t number, int base) { return uint8_t(pair_of(number) - base) >= kPairs && pair_of(number); }

// The least of the pairs of exponents that most numbers have.
int base_of(const uint16_t* numbers, int64_t n) {
    int64_t found[128] = {};
    for (int64_t i = 0; i < n; i += std::max<int64_t>(1, n / kSampled) | 1) ++found[pair_of(numbers[i])];
    int64_t covered = 0, most = -1;
    int base = 1;
    for (int pair = 1; pair < 128; ++pair) {
        covered += found[pair] - (pair > kPairs ? found[pair - kPairs] : 0);
        if (covered > most) most = covered, base = std::max(1, pair - kPairs + 1);
    }
    return base;
}

int64_t count_exceptions(const uint16_t* numbers, int64_t n, int base) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i += kShortNumbers) {
        uint16_t some = 0;
        for (int64_t j = i; j < std::min(i + kShortNumbers, n); ++j) some = uint16_t(some + is_exception(numbers[j], base));
        sum += some;
    }
    return sum;
}

// One panel of `n` numbers, into zeros.
void shorten_panel(const uint16_t* numbers, int64_t n, int base, uint8_t* out) {
    for (int code = 0; code < 16; ++code) out[code] = uint8_t((code % 8 < kPairs ? base + code % 8 : 0) | code / 8 << 7);
    uint8_t* const header = out;
    const int64_t n_blocks = (n + kShortNumbers - 1) / kShortNumbers;
    auto* exception = reinterpret_cast<ShortException*>(out + kShortHeader + n_blocks * kShortBlock);
    ShortException* const first = exception;
    out += kShortHeader;
    for (int64_t b = 0; b < n_blocks; ++b, out += kShortBlock) {
        const int here = int(std::min<int64_t>(kShortNumbers, n - b * kShortNumbers));
        uint16_t block[kShortNumbers] = {};
        std::memcpy(block, numbers + b * kShortNumbers, size_t(here) * 2);
        if (count_exceptions(block, here, base)) {
            ShortException* const of_block = exception;
            for (int i = 0; i < here; ++i) {
                if (!is_exception(block[i], base)) continue;
                const int64_t input = b * kShortInputs + i / 32 * 2 + i % 2;
                *exception++ = {uint32_t(input * kPanelRows + i % 32 / 2), block[i], 0};
                block[i] = 0;
            }
            std::sort(of_block, exception, [](auto a, auto b) { return a.place < b.place; });
        }
        uint8_t lower[kShortNumbers], codes[kShortNumbers];
        for (int i = 0; i < kShortNumbers; ++i) {
            const uint8_t above = uint8_t(pair_of(block[i]) - base);
            lower[i] = uint8_t(block[i]);
            codes[i] = uint8_t((above < kPairs ? above : kPairs) | (block[i] >> 12 & 8));
        }
        for (int eight = 0; eight < kShortNumbers / 8; ++eight) {  // of step eight / 4
            const int at = short_place(eight);
            std::memcpy(out + 64 + at, lower + eight * 8, 8);
            for (int i = 0; i < 8; ++i) out[at % 64 + i] = uint8_t(out[at % 64 + i] | codes[eight * 8 + i] << eight / 8 * 4);
        }
    }
    const uint32_t count = uint32_t(exception - first);
    std::memcpy(header + 16, &count, 4);
}

}  // namespace

// Whether weights are to be BF12 where the instruction set in use serves.
PETALITE_API int32_t petalite_short_serves() { return kernels().short_serves; }

// What BF12 needs for these dense BF16 panels: the least pair of exponents that has a code, and the most exceptions of a
// panel.
PETALITE_API void petalite_short_range(const void* panels, int64_t n_panels, int64_t n_in, int32_t* base, int32_t* most) {
    const auto* numbers = static_cast<const uint16_t*>(panels);
    const int64_t each = panel_bytes(Format::BF16, n_in, 0) / 2;
    *base = base_of(numbers, n_panels * each), *most = 0;
    for (int64_t p = 0; p < n_panels; ++p)
        *most = std::max(*most, int32_t(count_exceptions(numbers + p * each, each, *base)));
}

// The BF12 panels of these. `out` may be where they are themselves, if it needs no more room.
PETALITE_API void petalite_shorten(const void* panels, int64_t n_panels, int64_t n_in, int32_t base, int32_t most, void* out) {
    const auto* numbers = static_cast<const uint16_t*>(panels);
    const int64_t each = panel_bytes(Format::BF16, n_in, 0) / 2, size = panel_bytes(Format::BF12, n_in, most);
    std::vector<uint64_t> panel(size_t(size) / 8);
    for (int64_t p = 0; p < n_panels; ++p) {
        std::fill(panel.begin(), panel.end(), 0);
        shorten_panel(numbers + p * each, each, base, reinterpret_cast<uint8_t*>(panel.data()));
        std::memcpy(static_cast<uint8_t*>(out) + p * size, panel.data(), size_t(size));
    }
}
