// BF16 panels into BF12's; see short.h.
#include "short.h"

#include <algorithm>

#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));

// The lower bytes of eight words, then those of eight others.
Bytes narrowed(Words a, Words b) {
#if defined(__SSE2__)
    return Bytes(_mm_packus_epi16(__m128i(a & 0xff), __m128i(b & 0xff)));
#else
    Bytes bytes;
    for (int i = 0; i < 8; ++i) bytes[i] = uint8_t(a[i]), bytes[8 + i] = uint8_t(b[i]);
    return bytes;
#endif
}

// Of a block's numbers; exceptions get zero's code. Whether there are any.
bool shorten_block(const uint16_t* numbers, int base, uint8_t* out) {
    Bytes codes[kShortNumbers / 16], exceptions{};
    for (int i = 0; i < kShortNumbers / 16; ++i) {
        Words a, b;  // eight numbers of a step, eight of the next
        std::memcpy(&a, numbers + i / 4 * 64 + i % 4 * 8, sizeof a);
        std::memcpy(&b, numbers + i / 4 * 64 + i % 4 * 8 + 32, sizeof b);
        const Bytes lower = narrowed(a, b), upper = narrowed(a >> 8, b >> 8), pair = upper & 0x7f;
        const Bytes above = pair - uint8_t(base), beyond = Bytes(above >= uint8_t(kPairs));
        exceptions |= beyond & Bytes(pair != 0);
        codes[i] = (beyond & uint8_t(kPairs)) | (~beyond & above) | (upper >> 4 & 8);
        std::memcpy(out + 64 + i * 16, &lower, sizeof lower);
    }
    for (int i = 0; i < 4; ++i) {
        const Bytes both = codes[i] | codes[i + 4] << 4;
        std::memcpy(out + i * 16, &both, sizeof both);
    }
    uint64_t any[2];
    std::memcpy(any, &exceptions, sizeof any);
    return any[0] | any[1];
}

// One panel of `n` numbers; into `size` bytes.
void shorten_panel(const uint16_t* numbers, int64_t n, int base, uint8_t* out, int64_t size) {
    uint8_t* const end = out + size;
    std::memset(out, 0, size_t(kShortHeader));
    for (int code = 0; code < 16; ++code) out[code] = uint8_t((code % 8 < kPairs ? base + code % 8 : 0) | code / 8 << 7);
    uint8_t* const header = out;
    const int64_t n_blocks = (n + kShortNumbers - 1) / kShortNumbers;
    auto* exception = reinterpret_cast<ShortException*>(out + kShortHeader + n_blocks * kShortBlock);
    ShortException* const first = exception;
    out += kShortHeader;
    for (int64_t b = 0; b < n_blocks; ++b, out += kShortBlock) {
        uint16_t block[kShortNumbers] = {};
        std::memcpy(block, numbers + b * kShortNumbers, size_t(std::min<int64_t>(kShortNumbers, n - b * kShortNumbers)) * 2);
        if (!shorten_block(block, base, out)) continue;
        for (int k = 0; k < kShortInputs; ++k) {
            for (int r = 0; r < kPanelRows; ++r) {
                uint16_t& number = block[k / 2 * 32 + r * 2 + k % 2];
                if (!is_exception(number, base)) continue;
                *exception++ = {uint32_t((b * kShortInputs + k) * kPanelRows + r), number, 0};
                number = 0;
            }
        }
        shorten_block(block, base, out);
    }
    std::memset(exception, 0, size_t(end - reinterpret_cast<uint8_t*>(exception)));
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
    std::vector<uint16_t> panel(static_cast<size_t>(each));  // while it is where its own numbers are
    for (int64_t p = 0; p < n_panels; ++p, numbers += each) {
        uint8_t* const to = static_cast<uint8_t*>(out) + p * size;
        const auto* from = reinterpret_cast<const uint8_t*>(numbers);
        const bool apart = to + size <= from || from + each * 2 <= to;
        if (!apart) std::memcpy(panel.data(), numbers, size_t(each) * 2);
        shorten_panel(apart ? numbers : panel.data(), each, base, to, size);
    }
}
