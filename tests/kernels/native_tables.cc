// Every instruction set's products beside the scalar reference's, without Python: for processors that are only
// emulated (`make test-neon`). Prints what differs; exits with 1 if anything does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels.h"
#include "linear.h"

using namespace petalite;

PETALITE_API Team* petalite_team_new(int32_t);
PETALITE_API const char* petalite_table_name(int32_t);
PETALITE_API int32_t petalite_table_runs(int32_t);
PETALITE_API void petalite_table_choose(int32_t);
PETALITE_API void petalite_linear(Team*, const Linear*, const float*, int64_t, float*, void*);
PETALITE_API int64_t petalite_linear_scratch_bytes(const Linear*, int64_t);

namespace {

std::mt19937 random_bits(7);

// Panels of random codes or of small floats.
std::vector<uint8_t> panels_of(const Linear& linear) {
    std::vector<uint8_t> bytes(size_t(panel_bytes(linear) * panel_count(linear)));
    for (uint8_t& byte : bytes) byte = uint8_t(random_bits() % 255 + 1);
    const auto put = [&](size_t at, float value) { std::memcpy(bytes.data() + at, &value, 4); };
    std::normal_distribution<float> normal;
    if (linear.format == Format::F32)
        for (size_t i = 0; i < bytes.size(); i += 4) put(i, normal(random_bits));
    if (linear.format == Format::BF16 || linear.format == Format::F16)  // exponents of about 1
        for (size_t i = 1; i < bytes.size(); i += 2) bytes[i] = uint8_t((bytes[i] & 0x80) | 0x3c | (bytes[i] & 3));
    if (linear.format == Format::NF4)
        for (size_t block = 0; block < bytes.size(); block += kNf4BlockBytes)
            for (size_t r = 0; r < kPanelRows; ++r) put(block + 512 + r * 4, std::fabs(normal(random_bits)));
    return bytes;
}

// `n_fine` of the columns, then the others, each ascending.
std::vector<int32_t> columns_of(int32_t n_in, int32_t n_fine) {
    std::vector<int32_t> columns(static_cast<size_t>(n_in));
    std::iota(columns.begin(), columns.end(), 0);
    std::shuffle(columns.begin(), columns.end(), random_bits);
    std::sort(columns.begin(), columns.begin() + n_fine);
    std::sort(columns.begin() + n_fine, columns.end());
    return columns;
}

std::vector<float> product(int table, Team* team, const Linear& linear, const std::vector<float>& x, int64_t rows) {
    petalite_table_choose(table);
    std::vector<float> y(size_t(rows * linear.n_out));
    std::vector<char> memory(size_t(petalite_linear_scratch_bytes(&linear, rows)) + 64);
    char* scratch = memory.data() + (64 - uintptr_t(memory.data()) % 64);
    petalite_linear(team, &linear, x.data(), rows, y.data(), scratch);
    return y;
}

bool agree(Format format, const std::vector<float>& found, const std::vector<float>& expected) {
    if (format == Format::INT8 || format == Format::NF4)
        return std::memcmp(found.data(), expected.data(), found.size() * 4) == 0;
    float largest = 0, off = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        largest = std::max(largest, std::fabs(expected[i]));
        off = std::max(off, std::fabs(found[i] - expected[i]));
    }
    return off <= 1e-2f * largest && std::isfinite(off);  // some round inputs to bfloat16
}

}  // namespace

int main() {
    int scalar = 0, checked = 0, wrong = 0;
    while (std::strcmp(petalite_table_name(scalar), "scalar") != 0) ++scalar;
    std::normal_distribution<float> normal;
    for (int round = 0; round < 60; ++round) {
        Team* team = petalite_team_new(1 + round % 3);
        const int64_t rows = 1 + random_bits() % 20;
        const int32_t n_out = 1 + random_bits() % 70, n_in = 8 + random_bits() % 693;
        std::vector<float> x(size_t(rows * n_in)), scale(size_t(n_out + kPanelRows)), bias(static_cast<size_t>(n_out));
        for (auto* values : {&x, &scale, &bias})
            for (float& value : *values) value = normal(random_bits);
        for (float& value : x) value *= std::exp(2 * normal(random_bits));  // blocks have steps of their own
        for (int f = 0; f < 5; ++f) {
            const bool digits = f >= int(Format::INT8);
            const int32_t most = !digits ? 0 : std::min(n_in, f == int(Format::INT8) ? 64 : 200);
            const int32_t n_fine = round % 4 == 0 ? 0 : round % 4 == 1 ? most : int32_t(random_bits() % (most + 1));
            const std::vector<int32_t> columns = columns_of(n_in, n_fine);
            if (digits && round % 5 == 0) x[random_bits() % x.size()] = INFINITY;  // all that its token gives is NaN
            Linear linear{Format(f), n_out, n_in, n_fine, nullptr, scale.data(), columns.data(), bias.data()};
            const std::vector<uint8_t> panels = panels_of(linear);
            linear.weight = panels.data();
            const std::vector<float> expected = product(scalar, team, linear, x, rows);
            for (int table = 0; table < scalar; ++table) {
                if (!petalite_table_runs(table)) continue;
                ++checked;
                if (agree(linear.format, product(table, team, linear, x, rows), expected)) continue;
                ++wrong;
                std::printf("%s differs: format %d, %d x %d, %d rows\n", petalite_table_name(table), f, n_out, n_in,
                            int(rows));
            }
        }
    }
    for (int table = 0; table < scalar; ++table)
        std::printf("%s %s\n", petalite_table_name(table), petalite_table_runs(table) ? "runs" : "does not run here");
    std::printf("%d products compared, %d differ\n", checked, wrong);
    return wrong || !checked;
}
