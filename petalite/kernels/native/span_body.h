// The body of every span_ISA.cc, which define PETALITE_ISA: the kernels of span_kernels.h over simd.h.
#pragma once

#include "simd.h"
#include "span_kernels.h"

namespace PETALITE_ISA {

using petalite::Attended;
using petalite::CachedHead;
using petalite::Format;
using petalite::kChunkKeys;
using petalite::kTileKeys;
using petalite::padded;
using petalite::Queries;

constexpr float kNever = -3.4028234663852886e38f;  // the largest logit where there is none

// -- norms, activations, sums ---------------------------------------------------------------------------------

// f(i, count) for every 16 of n, the last maybe fewer.
template <typename F>
inline void each(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, LANES);
    if (i < n) f(i, int(n - i));
}

inline V load_up_to(const float* p, int count) { return count == LANES ? load(p) : load_first(p, count); }

inline void store_up_to(float* p, V a, int count) {
    if (count == LANES) {
        store(p, a);
    } else {
        store_first(p, a, count);
    }
}

void rms_norm(const float* x, const float* weight, int64_t n, float n_eps, float* out) {
    V squares = splat(0.0f);
    each(n, [&](int64_t i, int count) {
        const V part = load_up_to(x + i, count);
        squares = fma(part, part, squares);
    });
    const V root = splat(sqrtf(sum_lanes(squares) + n_eps));
    each(n, [&](int64_t i, int count) {
        const V part = div(load_up_to(x + i, count), root);
        store_up_to(out + i, mul(part, load_up_to(weight + i, count)), count);
    });
}

void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out) {
    V total = splat(0.0f);
    each(n, [&](int64_t i, int count) { total = add(total, load_up_to(x + i, count)); });
    const float mean = sum_lanes(total) / float(n);
    const V centre = splat(mean);
    V squares = splat(0.0f);
    each(n, [&](int64_t i, int count) {
        V part = sub(load_up_to(x + i, count), centre);
        if (count < LANES) {  // nothing lies behind the end
            float kept[LANES];
            store(kept, part);
            part = load_first(kept, count);
        }
        squares = fma(part, part, squares);
    });
    const V root = splat(sqrtf(sum_lanes(squares) / float(n) + eps));
    each(n, [&](int64_t i, int count) {
        const V part = div(sub(load_up_to(x + i, count), centre), root);
        store_up_to(out + i, fma(part, load_up_to(weight + i, count), load_up_to(bias + i, count)), count);
    });
}

void gelu(float* x, int64_t n) {
    each(n, [&](int64_t i, int count) {  // x/2 · (1 + tanh u) = x / (1 + exp(-2u))
        const V part = load_up_to(x + i, count);
        const V cubic = fma(mul(mul(part, part), part), splat(0.044715f), part);
        const V below = add(splat(1.0f), exponential(mul(cubic, splat(-2.0f * 0.7978845608028654f))));
        store_up_to(x + i, div(part, below), count);
    });
}

// -- heads ----------------------------------------------------------------------------------------------------

void rotate(float* head, const float* rotation, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim; i += 2) {
        const float x = head[i], y = head[i + 1], cosine = rotation[i], sine = rotation[i + 1];
        // Fused explicitly: GCC 12 fuses this pair of lines by itself, whatever it was told of contraction.
        head[i] = fmaf(x, cosine, -(y * sine));
        head[i + 1] = fmaf(x, sine, y * cosine);
    }
}

void narrow(const float* x, int64_t n, Format format, void* out) {
    if (format == Format::F32) {
        memcpy(out, x, size_t(n) * 4);
        return;
    }
    uint16_t* halves = static_cast<uint16_t*>(out);
    if (format == Format::BF16) {
        for (int64_t i = 0; i < n; i++) halves[i] = to_bf16(x[i]);
    } else {
        for (int64_t i = 0; i < n; i++) halves[i] = to_f16(x[i]);
    }
}

// 16 cached numbers from number `i` on.
template <Format format>
inline V widened(const void* numbers, int64_t i) {
    if constexpr (format == Format::F32) return load(static_cast<const float*>(numbers) + i);
    if constexpr (format == Format::BF16) return load_bf16(static_cast<const uint16_t*>(numbers) + i);
    if constexpr (format == Format::F16) return load_f16(static_cast<const uint16_t*>(numbers) + i);
}

template <Format format>
inline float widened_one(const void* numbers, int64_t i) {
    if constexpr (format == Format::F32) return static_cast<const float*>(numbers)[i];
    if constexpr (format == Format::BF16) return from_bf16(static_cast<const uint16_t*>(numbers)[i]);
    if constexpr (format == Format::F16) return from_f16(static_cast<const uint16_t*>(numbers)[i]);
}

// -- attention ------------------------------------------------------------------------------------------------

// Of a tile, as much as registers hold: 4 queries by so many times 16 keys or values.
#if defined(PETALITE_SIMD_AVX512)
constexpr int kWide = 4;
#else
constexpr int kWide = 1;
#endif

// (n_keys, head_dim) → (head_dim, kTileKeys), zeros in the columns behind the last key.
template <Format format>
void turn(const void* keys, int64_t first, int n_keys, int64_t head_dim, float* out) {
    int64_t d = 0;
    for (; d + LANES <= head_dim; d += LANES) {
        for (int key = 0; key < kTileKeys; key += LANES) {
            V block[LANES];
            for (int i = 0; i < LANES; i++) {
                const bool there = key + i < n_keys;
                block[i] = there ? widened<format>(keys, (first + key + i) * head_dim + d) : splat(0.0f);
            }
            transpose(block);
            for (int i = 0; i < LANES; i++) store(out + (d + i) * kTileKeys + key, block[i]);
        }
    }
    for (; d < head_dim; d++) {
        for (int key = 0; key < kTileKeys; key++) {
            out[d * kTileKeys + key] = key < n_keys ? widened_one<format>(keys, (first + key) * head_dim + d) : 0.0f;
        }
    }
}

// (n_keys, head_dim) → (n_keys, padded(head_dim)) float32.
template <Format format>
void widen(const void* values, int64_t first, int n_keys, int64_t head_dim, float* out) {
    const int64_t width = padded(head_dim);
    for (int key = 0; key < n_keys; key++) {
        const int64_t from = (first + key) * head_dim;
        int64_t d = 0;
        for (; d + LANES <= head_dim; d += LANES) store(out + key * width + d, widened<format>(values, from + d));
        for (; d < width; d++) out[key * width + d] = d < head_dim ? widened_one<format>(values, from + d) : 0.0f;
    }
}

// logits[r][0..64) of `rows` queries against a transposed tile.
template <int rows>
void dot(const float* queries, const float* tile, int64_t head_dim, float* logits) {
    for (int column = 0; column < kTileKeys; column += kWide * LANES) {
        V sums[rows][kWide];
        for (int r = 0; r < rows; r++) {
            for (int w = 0; w < kWide; w++) sums[r][w] = splat(0.0f);
        }
        for (int64_t d = 0; d < head_dim; d++) {
            V keys[kWide];
            for (int w = 0; w < kWide; w++) keys[w] = load(tile + d * kTileKeys + column + w * LANES);
            for (int r = 0; r < rows; r++) {
                const V query = splat(queries[r * head_dim + d]);
                for (int w = 0; w < kWide; w++) sums[r][w] = fma(query, keys[w], sums[r][w]);
            }
        }
        for (int r = 0; r < rows; r++) {
            for (int w = 0; w < kWide; w++) store(logits + r * kChunkKeys + column + w * LANES, sums[r][w]);
        }
    }
}

// weighted[r] += Σ shares[r][key] · values[key], key after key. `width` is a multiple of 16.
template <int rows, int wide>
void weigh_columns(const float* shares, const float* values, int n_keys, int64_t width, float* weighted) {
    V sums[rows][wide];
    for (int r = 0; r < rows; r++) {
        for (int w = 0; w < wide; w++) sums[r][w] = load(weighted + r * width + w * LANES);
    }
    for (int key = 0; key < n_keys; key++) {
        V value[wide];
        for (int w = 0; w < wide; w++) value[w] = load(values + key * width + w * LANES);
        for (int r = 0; r < rows; r++) {
            const V share = splat(shares[r * kChunkKeys + key]);
            for (int w = 0; w < wide; w++) sums[r][w] = fma(share, value[w], sums[r][w]);
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int w = 0; w < wide; w++) store(weighted + r * width + w * LANES, sums[r][w]);
    }
}

template <int rows>
void weigh(const float* shares, const float* values, int n_keys, int64_t width, float* weighted) {
    int64_t d = 0;
    for (; d + kWide * LANES <= width; d += kWide * LANES) {
        weigh_columns<rows, kWide>(shares, values + d, n_keys, width, weighted + d);
    }
    for (; d < width; d += LANES) weigh_columns<rows, 1>(shares, values + d, n_keys, width, weighted + d);
}

template <int n>
struct Rows {
    static constexpr int count = n;
};

// f(Rows, first) for the queries [first, end): four at a time, then what is left.
template <typename F>
inline void in_fours(int64_t first, int64_t end, F f) {
    for (; first + 4 <= end; first += 4) f(Rows<4>(), first);
    if (end - first == 3) return f(Rows<3>(), first);
    if (end - first == 2) return f(Rows<2>(), first);
    if (end - first == 1) return f(Rows<1>(), first);
}

// Logits of a chunk → exp(logit - largest), zero for keys outside [from, to) of it.
inline void soften(float* logits, int64_t from, int64_t to, int64_t begin, int64_t end, float* largest, float* sum) {
    for (int64_t i = begin; i < from && i < end; i++) logits[i] = -INFINITY;
    for (int64_t i = to < begin ? begin : to; i < end; i++) logits[i] = -INFINITY;
    V most = splat(kNever);
    for (int64_t i = begin; i < end; i += LANES) most = max(most, load(logits + i));
    *largest = max_lanes(most);
    const V top = splat(*largest);
    V total = splat(0.0f);
    for (int64_t i = begin; i < end; i += LANES) {
        const V share = exponential(sub(load(logits + i), top));
        store(logits + i, share);
        total = add(total, share);
    }
    *sum = sum_lanes(total);
}

template <Format format>
void attend_in(const CachedHead& head, const Queries& queries, int64_t chunk, const Attended& out, float* work) {
    const int64_t head_dim = head.head_dim, width = padded(head_dim), group = head.group;
    const int64_t n_rows = queries.n_tokens * group, base = chunk * kChunkKeys;
    const int64_t last = queries.position + queries.n_tokens - 1;
    const int64_t oldest = head.window && queries.position >= head.window ? queries.position - head.window + 1 : 0;
    const int64_t stop = last + 1 - base < kChunkKeys ? last + 1 - base : kChunkKeys;  // keys of the chunk there are
    const int64_t begin = oldest <= base ? 0 : (oldest - base) / kTileKeys * kTileKeys;
    const int64_t end = petalite::round_up(stop, kTileKeys);
    float* logits = work;
    float* keys = logits + n_rows * kChunkKeys;
    float* values = keys + head_dim * kTileKeys;

    // Of a tile, the queries that see any of it: not those before it, nor those whose window ends before it.
    const auto first_row = [&](int64_t tile) {
        const int64_t token = base + tile - queries.position;
        return token <= 0 ? int64_t(0) : token * group;
    };
    const auto end_row = [&](int64_t tile) {
        if (!head.window) return n_rows;
        const int64_t token = base + tile + kTileKeys - 1 + head.window - queries.position;
        return token <= 0 ? int64_t(0) : token * group < n_rows ? token * group : n_rows;
    };

    for (int64_t tile = begin; tile < end; tile += kTileKeys) {
        const int n_keys = int(stop - tile < kTileKeys ? stop - tile : kTileKeys);
        turn<format>(head.keys, base + tile, n_keys, head_dim, keys);
        in_fours(first_row(tile), end_row(tile), [&](auto rows, int64_t r) {
            const float* own = queries.rows + r * head_dim;
            dot<decltype(rows)::count>(own, keys, head_dim, logits + r * kChunkKeys + tile);
        });
    }
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t position = queries.position + r / group;
        float* own = logits + r * kChunkKeys;
        if (head.slopes) {
            const float slope = head.slopes[r % group];
            for (int64_t i = begin; i < end; i++) own[i] += slope * float(base + i - position);
        }
        const int64_t from = head.window && position - head.window + 1 > base ? position - head.window + 1 - base : 0;
        soften(own, from, position + 1 - base, begin, end, out.largest + r, out.sum + r);
        for (int64_t d = 0; d < width; d += LANES) store(out.weighted + r * width + d, splat(0.0f));
    }
    for (int64_t tile = begin; tile < end; tile += kTileKeys) {
        const int n_keys = int(stop - tile < kTileKeys ? stop - tile : kTileKeys);
        const float* tile_values = values;
        if (format == Format::F32 && width == head_dim) {
            tile_values = static_cast<const float*>(head.values) + (base + tile) * head_dim;
        } else {
            widen<format>(head.values, base + tile, n_keys, head_dim, values);
        }
        in_fours(first_row(tile), end_row(tile), [&](auto rows, int64_t r) {
            const float* shares = logits + r * kChunkKeys + tile;
            weigh<decltype(rows)::count>(shares, tile_values, n_keys, width, out.weighted + r * width);
        });
    }
}

void attend(const CachedHead& head, const Queries& queries, int64_t chunk, const Attended& out, float* work) {
    switch (head.format) {
        case Format::BF16: return attend_in<Format::BF16>(head, queries, chunk, out, work);
        case Format::F16: return attend_in<Format::F16>(head, queries, chunk, out, work);
        default: return attend_in<Format::F32>(head, queries, chunk, out, work);
    }
}

void merge(const Attended& chunk, int64_t n_rows, int64_t head_dim, const Attended& sum) {
    const int64_t width = padded(head_dim);
    for (int64_t r = 0; r < n_rows; r++) {
        const float one = sum.largest[r], other = chunk.largest[r], top = one < other ? other : one;
        const float keep = exponential(one - top), take = exponential(other - top);
        sum.largest[r] = top;
        sum.sum[r] = fmaf(chunk.sum[r], take, sum.sum[r] * keep);
        const V keeps = splat(keep), takes = splat(take);
        for (int64_t d = r * width; d < (r + 1) * width; d += LANES) {
            store(sum.weighted + d, fma(load(chunk.weighted + d), takes, mul(load(sum.weighted + d), keeps)));
        }
    }
}

void finish(const Attended& all, int64_t n_rows, int64_t head_dim, int64_t group, float* out, int64_t stride) {
    const int64_t width = padded(head_dim);
    for (int64_t r = 0; r < n_rows; r++) {
        const V sum = splat(all.sum[r]);
        const float* weighted = all.weighted + r * width;
        float* place = out + r / group * stride + r % group * head_dim;
        each(head_dim, [&](int64_t i, int count) { store_up_to(place + i, div(load(weighted + i), sum), count); });
    }
}

}  // namespace PETALITE_ISA
