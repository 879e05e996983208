// A product over a team: activations made ready, panels shared out, results finished.
#include "linear.h"

#include <algorithm>

#include "kernels.h"

namespace petalite {
namespace {

constexpr int64_t kAloneValues = 1 << 15;   // activations that every worker prepares for itself sooner than wait
constexpr int64_t kPieceBytes = 24 << 10;   // of weights in one piece of work, about a microsecond's
constexpr int64_t kGatedBytes = 96 << 10;   // of gates in one, then of ups: memory is slow to turn to another stream
constexpr int64_t kMinPieces = 8;           // of each worker's, in spite of that
constexpr int kMaxPanels = 4;               // of one call of `multiply` with a whole tile

struct Tiles {
    int count;
    int64_t rows;
    size_t stride;  // bytes from one tile to the next

    Tiles(const Linear& linear, int64_t rows) : count(int((rows + kMaxTile - 1) / kMaxTile)), rows(rows) {
        stride = size_t(round_up(int64_t(kernels().tile_bytes(linear, size(0))), 64));
    }
    // Tiles differ by one token at most; the first are the larger ones.
    int64_t begin(int i) const { return rows / count * i + std::min<int64_t>(i, rows % count); }
    int size(int i) const { return int(begin(i + 1) - begin(i)); }
};

struct Output {
    const Linear& linear;
    float* y;
    int64_t stride;
    Epilogue epilogue;

    // sums: 16 rows of one token from `row` on.
    void write(int64_t token, int64_t row, const float* sums) const {
        const int n = int(std::min<int64_t>(kPanelRows, linear.n_out - row));
        float* out = y + token * stride + row;
        for (int i = 0; i < n; ++i) {
            const float value = linear.bias ? sums[i] + linear.bias[row + i] : sums[i];
            out[i] = epilogue == Epilogue::Add ? out[i] + value : value;
        }
    }

    void write_gated(int64_t token, int64_t row, const float* gates, const float* ups) const {
        const int64_t half = linear.n_out / 2;
        float biased[2][kPanelRows];
        for (int i = 0; i < kPanelRows; ++i) {
            biased[0][i] = linear.bias ? gates[i] + linear.bias[row + i] : gates[i];
            biased[1][i] = linear.bias ? ups[i] + linear.bias[half + row + i] : ups[i];
        }
        kernels().gate(biased[0], biased[1], y + token * stride + row);
    }
};

void multiply_piece(const Linear& linear, const Tiles& tiles, const char* prepared, int64_t begin, int64_t end,
                    const Output& output) {
    const int64_t gated = output.epilogue == Epilogue::SiluGate ? linear.n_out / 2 / kPanelRows : 0;
    const bool once = tiles.count == 1;
    const int step = (once ? kMaxPanels * kMaxTile / tiles.size(0) : kMaxPanels) / (gated ? 2 : 1);
    float sums[kMaxPanels * kMaxTile * kPanelRows];
    for (int64_t first = begin; first < end; first += step) {
        const int64_t n = std::min<int64_t>(step, end - first);
        for (int i = 0; i < tiles.count; ++i) {
            const char* tile = prepared + i * tiles.stride;
            const int n_tokens = tiles.size(i);
            const int64_t each = n_tokens * kPanelRows;
            kernels().multiply(linear, tile, n_tokens, first, n, once, sums);
            if (gated) kernels().multiply(linear, tile, n_tokens, first + gated, n, once, sums + n * each);
            for (int64_t p = 0; p < n; ++p) {
                for (int t = 0; t < n_tokens; ++t) {
                    const float* found = sums + p * each + t * kPanelRows;
                    const int64_t token = tiles.begin(i) + t, row = (first + p) * kPanelRows;
                    if (gated) output.write_gated(token, row, found, found + n * each);
                    else output.write(token, row, found);
                }
            }
        }
    }
}

}  // namespace

size_t linear_scratch_bytes(const Linear& linear, int64_t rows) {
    const Tiles tiles(linear, rows);
    return tiles.count * tiles.stride;
}

void linear_apply(Worker& worker, const Linear& linear, const float* x, int64_t rows, int64_t x_stride, float* y,
                  int64_t y_stride, Scratch& scratch, Epilogue epilogue) {
    const Tiles tiles(linear, rows);
    const auto prepare = [&](char* memory, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            kernels().prepare(linear, x + tiles.begin(int(i)) * x_stride, x_stride, tiles.size(int(i)),
                              memory + i * tiles.stride);
    };
    char* prepared = scratch.data;
    char* own = worker.count > 1 && rows * linear.n_in <= kAloneValues
                    ? static_cast<char*>(worker.local(tiles.count * tiles.stride))
                    : nullptr;
    if (own) prepare(prepared = own, 0, tiles.count);
    else worker.share(tiles.count, 1, [&](int64_t begin, int64_t end) { prepare(prepared, begin, end); });

    const bool gated = epilogue == Epilogue::SiluGate;
    const int64_t n_panels = panel_count(linear) / (gated ? 2 : 1);
    const int64_t least = linear.format == Format::NF4 ? kMaxPanels : 1;  // together, for one by itself waits for its sums
    int64_t grain = std::max<int64_t>(least, kPieceBytes / panel_bytes(linear));
    if (gated && tiles.count == 1) {
        const int64_t most = n_panels / (kMinPieces * worker.count);
        grain = std::max(grain, std::min(most, kGatedBytes / panel_bytes(linear)));
    }
    const Output output{linear, y, y_stride, epilogue};
    worker.share(n_panels, grain, [&](int64_t begin, int64_t end) {
        multiply_piece(linear, tiles, prepared, begin, end, output);
    });
}

}  // namespace petalite

namespace {

using namespace petalite;

struct Call {
    const Linear& linear;
    const float* x;
    int64_t rows;
    float* y;
    Scratch scratch;
};

}  // namespace

// One product by itself: x (rows, n_in) and y (rows, n_out) contiguous, scratch of petalite_linear_scratch_bytes.
PETALITE_API void petalite_linear(Team* team, const Linear* linear, const float* x, int64_t rows, float* y,
                                  void* scratch) {
    Call call{*linear, x, rows, y, {static_cast<char*>(scratch), 0}};
    const auto job = [](Worker& worker, void* context) {
        Call& call = *static_cast<Call*>(context);
        linear_apply(worker, call.linear, call.x, call.rows, call.linear.n_in, call.y, call.linear.n_out, call.scratch);
    };
    team_run(team, job, &call);
}

PETALITE_API int64_t petalite_linear_scratch_bytes(const Linear* linear, int64_t rows) {
    return int64_t(linear_scratch_bytes(*linear, rows));
}

PETALITE_API int64_t petalite_panel_bytes(int32_t format, int64_t n_in, int64_t n_fine) {
    return panel_bytes(Format(format), n_in, n_fine);
}
