// A step of a span: what runs after what, and which worker does which part of it.
//
// Tokens go through all blocks in windows, so that activations of a long prefill stay small; a window sees in the
// caches what the one before left there. Between windows, and between any other cuts of the work, no number
// changes: every token is computed by itself, and its attention adds up chunks of keys that lie at fixed positions.
#include "span.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "span_kernels.h"

namespace petalite {

const SpanKernels& span_kernels() {
    static const SpanKernels* const all[] = {
#if defined(__x86_64__)
        &avx512_span_kernels, &avx2_span_kernels,
#elif defined(__aarch64__)
        &neon_span_kernels,
#endif
        &scalar_span_kernels};
    for (const SpanKernels* one : all) {
        if (strncmp(one->name, kernels().name, strlen(one->name)) == 0) return *one;  // neon-i8mm: neon
    }
    return scalar_span_kernels;
}

namespace {

constexpr int64_t kWindowTokens = 256;
constexpr int64_t kAloneTokens = 2;   // up to so many every worker norms for itself: quicker than to wait
constexpr int64_t kSplitTokens = 32;  // up to so many, one row's attention is shared out by keys as well

struct Token {
    const SpanSegment* segment;
    int64_t position;
};

// Consecutive tokens of one row and one key head.
struct Item {
    int64_t token, n_tokens;  // the first, in the window
    int32_t head;
    int64_t piece;  // when split, the first of its pieces
};

struct Piece {
    int64_t item, chunk;
};

class Step {
  public:
    Step(Team* team, const SpanCall& call)
        : call_(call), shape_(*call.shape), kernels_(span_kernels()), n_workers_(team_size(team)) {
        group_ = shape_.n_heads / shape_.n_kv_heads;
        tokens_per_item_ = kQueryRows / group_ > 0 ? kQueryRows / group_ : 1;
        rows_per_item_ = tokens_per_item_ * group_;
        heads_width_ = int64_t(shape_.n_heads + 2 * shape_.n_kv_heads) * shape_.head_dim;
        output_width_ = int64_t(shape_.n_heads) * shape_.head_dim;
        for (int64_t s = 0; s < call.n_segments; s++) {
            const SpanSegment& segment = call.segments[s];
            for (int64_t i = 0; i < segment.n_tokens; i++) all_.push_back({&segment, segment.position + i});
        }
        window_tokens_ = int64_t(all_.size()) < kWindowTokens ? int64_t(all_.size()) : kWindowTokens;
    }

    int64_t n_tokens() const { return int64_t(all_.size()); }
    int64_t window_tokens() const { return window_tokens_; }

    // The tokens from `first` on that the next run computes.
    void take_window(int64_t first) {
        n_tokens_ = n_tokens() - first < window_tokens_ ? n_tokens() - first : window_tokens_;
        tokens_ = all_.data() + first;
        hidden_ = call_.hidden + first * shape_.hidden;
        items_.clear();
        pieces_.clear();
        one_each_ = true;
        for (int64_t token = 0; token < n_tokens_;) {
            int64_t end = token + 1;
            while (end < n_tokens_ && end - token < tokens_per_item_ && tokens_[end].segment == tokens_[token].segment) {
                end++;
            }
            one_each_ = one_each_ && tokens_[token].segment->n_tokens == 1;
            for (int32_t head = 0; head < shape_.n_kv_heads; head++) items_.push_back({token, end - token, head, 0});
            token = end;
        }
        split_ = false;
        if (n_workers_ > 1 && n_tokens() <= kSplitTokens) split();
    }

    // Lays out the scratch; returns its size. Call with the largest window taken.
    int64_t lay_out() {
        int64_t at = 0;
        const auto take = [&](int64_t floats) {
            const int64_t place = at;
            at += round_up(floats * 4, 64);
            return reinterpret_cast<float*>(call_.scratch + place);
        };
        normed_ = take(window_tokens_ * shape_.hidden);
        heads_ = take(window_tokens_ * heads_width_);
        attended_ = take(window_tokens_ * output_width_);
        inner_ = take(window_tokens_ * shape_.inner);
        own_floats_ = round_up(own_floats(), 16);
        own_ = take(own_floats_ * n_workers_);
        partial_floats_ = round_up(attended_floats(), 16);
        partials_ = take(partial_floats_ * int64_t(pieces_.size()));
        size_t linear = 0;
        for (int64_t b = 0; b < call_.n_blocks; b++) {
            const SpanBlock& block = call_.blocks[b];
            for (const Linear* one : {&block.qkv, &block.output, &block.up, &block.down}) {
                const size_t bytes = linear_scratch_bytes(*one, window_tokens_);
                linear = linear < bytes ? bytes : linear;
            }
        }
        scratch_ = {call_.scratch + at, linear};
        return at + int64_t(linear);
    }

    void run(Worker& worker) {
        for (int64_t b = 0; b < call_.n_blocks; b++) {
            const SpanBlock& block = call_.blocks[b];
            Scratch scratch = scratch_;
            const auto apply = [&](const Linear& linear, const float* x, int64_t width, float* y, int64_t y_width,
                                   Epilogue epilogue) {
                linear_apply(worker, linear, x, n_tokens_, width, y, y_width, scratch, epilogue);
            };
            const int64_t hidden = shape_.hidden, inner = shape_.inner;
            const float* x = norm(worker, block.attention_norm, block.attention_norm_bias);
            apply(block.qkv, x, hidden, heads_, heads_width_, Epilogue::Store);
            attend(worker, block, b);
            apply(block.output, attended_, output_width_, hidden_, hidden, Epilogue::Add);
            x = norm(worker, block.mlp_norm, block.mlp_norm_bias);
            apply(block.up, x, hidden, inner_, inner, shape_.gated ? Epilogue::SiluGate : Epilogue::Store);
            if (!shape_.gated) {
                worker.share(n_tokens_, 1, [&](int64_t begin, int64_t end) {
                    kernels_.gelu(inner_ + begin * inner, (end - begin) * inner);
                });
            }
            apply(block.down, inner_, inner, hidden_, hidden, Epilogue::Add);
        }
    }

  private:
    int64_t attended_floats() const { return rows_per_item_ * (2 + padded(shape_.head_dim)); }

    // Of one worker: its copy of the normed tokens; queries of an item; what a chunk and all chunks give; work.
    int64_t own_floats() const {
        return kAloneTokens * shape_.hidden + rows_per_item_ * shape_.head_dim + 2 * round_up(attended_floats(), 16) +
               attend_floats(rows_per_item_, shape_.head_dim) + 64;
    }

    float* own(const Worker& worker) const { return own_ + worker.index * own_floats_; }

    Attended attended_at(float* place) const {
        const int64_t width = padded(shape_.head_dim);
        return {place + rows_per_item_ * width, place + rows_per_item_ * (width + 1), place};
    }

    // Few items and long rows: pieces of one chunk each, merged afterwards.
    void split() {
        int64_t chunks = 0;
        for (Item& item : items_) {
            item.piece = int64_t(pieces_.size());
            const int64_t last = tokens_[item.token].position + item.n_tokens - 1;
            for (int64_t chunk = 0; chunk <= last / kChunkKeys; chunk++) {
                pieces_.push_back({int64_t(&item - items_.data()), chunk});
            }
            chunks = chunks < last / kChunkKeys + 1 ? last / kChunkKeys + 1 : chunks;
        }
        split_ = chunks > 1;
        if (!split_) pieces_.clear();
    }

    const float* norm(Worker& worker, const float* weight, const float* bias) {
        const auto one = [&](int64_t token, float* out) {
            const float* x = hidden_ + token * shape_.hidden;
            if (bias) {
                kernels_.layer_norm(x, weight, bias, shape_.hidden, shape_.eps, out);
            } else {
                kernels_.rms_norm(x, weight, shape_.hidden, shape_.eps * float(shape_.hidden), out);
            }
        };
        const bool alone = n_tokens_ <= kAloneTokens && !shape_.residual_after_norm;
        float* out = alone ? own(worker) : shape_.residual_after_norm ? hidden_ : normed_;
        if (alone) {
            for (int64_t token = 0; token < n_tokens_; token++) one(token, out + token * shape_.hidden);
        } else {
            worker.share(n_tokens_, 4, [&](int64_t begin, int64_t end) {
                for (int64_t token = begin; token < end; token++) one(token, out + token * shape_.hidden);
            });
        }
        return out;
    }

    void attend(Worker& worker, const SpanBlock& block, int64_t b) {
        const int64_t n_items = int64_t(items_.size());
        const bool at_once = one_each_ && !split_;
        if (!at_once) {
            worker.share(n_tokens_ * shape_.n_kv_heads, 4, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    prepare(block, b, i / shape_.n_kv_heads, int32_t(i % shape_.n_kv_heads));
                }
            });
        }
        if (split_) {
            attend_split(worker, block, b);
            return;
        }
        worker.share(n_items, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const Item& item = items_[i];
                if (at_once) prepare(block, b, item.token, item.head);
                attend_item(block, b, item, own(worker) + kAloneTokens * shape_.hidden);
            }
        });
    }

    // The queries of one key head, its key and its value: normed, rotated, scaled; key and value into the cache.
    void prepare(const SpanBlock& block, int64_t b, int64_t index, int32_t head) {
        const int64_t head_dim = shape_.head_dim;
        const Token& token = tokens_[index];
        float* heads = heads_ + index * heads_width_;
        const auto place = [&](int64_t h) {
            float* own = heads + h * head_dim;
            if (block.head_norm) {
                const float n_eps = shape_.eps * float(head_dim);
                kernels_.rms_norm(own, block.head_norm + h * head_dim, head_dim, n_eps, own);
            }
            if (block.rope) kernels_.rotate(own, call_.rotation + token.position * head_dim, head_dim);
            return own;
        };
        const float scale = 1.0f / sqrtf(float(head_dim));
        for (int64_t h = head * group_; h < (head + 1) * group_; h++) {
            float* query = place(h);
            for (int64_t d = 0; d < head_dim; d++) query[d] *= scale;
        }
        const float* key = place(shape_.n_heads + head);
        const float* value = heads + (shape_.n_heads + shape_.n_kv_heads + head) * head_dim;
        const int64_t offset = token.position * head_dim * width_of_number();
        kernels_.narrow(key, head_dim, shape_.cache, cached(b, *token.segment, head, 0) + offset);
        kernels_.narrow(value, head_dim, shape_.cache, cached(b, *token.segment, head, 1) + offset);
    }

    int64_t width_of_number() const { return shape_.cache == Format::F32 ? 4 : 2; }

    // Keys (0) or values (1) of a head, from position 0 on.
    char* cached(int64_t b, const SpanSegment& segment, int32_t head, int which) const {
        const int64_t place = (which * int64_t(shape_.n_kv_heads) + head) * segment.capacity;
        return static_cast<char*>(segment.blocks[b]) + place * shape_.head_dim * width_of_number();
    }

    CachedHead cached_head(const SpanBlock& block, int64_t b, const Item& item) const {
        const SpanSegment& segment = *tokens_[item.token].segment;
        const float* slopes = shape_.slopes ? shape_.slopes + item.head * group_ : nullptr;
        return {cached(b, segment, item.head, 0), cached(b, segment, item.head, 1), shape_.cache, shape_.head_dim,
                int32_t(group_), block.window, slopes};
    }

    // The item's queries in a row, copied to `room` unless they lie so already.
    Queries queries(const Item& item, float* room) const {
        const float* first = heads_ + item.token * heads_width_ + item.head * group_ * shape_.head_dim;
        const int64_t position = tokens_[item.token].position, width = group_ * shape_.head_dim;
        if (item.n_tokens == 1) return {first, position, 1};
        for (int64_t t = 0; t < item.n_tokens; t++) {
            memcpy(room + t * width, first + t * heads_width_, size_t(width) * 4);
        }
        return {room, position, int32_t(item.n_tokens)};
    }

    int64_t first_chunk(const SpanBlock& block, const Item& item) const {
        const int64_t oldest = tokens_[item.token].position - block.window + 1;
        return block.window && oldest > 0 ? oldest / kChunkKeys : 0;
    }

    int64_t last_chunk(const Item& item) const {
        return (tokens_[item.token].position + item.n_tokens - 1) / kChunkKeys;
    }

    void attend_item(const SpanBlock& block, int64_t b, const Item& item, float* room) {
        const CachedHead head = cached_head(block, b, item);
        const Queries rows = queries(item, room);
        const int64_t n_rows = item.n_tokens * group_;
        room += round_up(rows_per_item_ * shape_.head_dim, 16);
        const Attended all = attended_at(room), one = attended_at(room + round_up(attended_floats(), 16));
        float* work = room + 2 * round_up(attended_floats(), 16);
        const int64_t first = first_chunk(block, item), last = last_chunk(item);
        kernels_.attend(head, rows, first, all, work);
        for (int64_t chunk = first + 1; chunk <= last; chunk++) {
            kernels_.attend(head, rows, chunk, one, work);
            kernels_.merge(one, n_rows, shape_.head_dim, all);
        }
        finish(item, all);
    }

    void attend_split(Worker& worker, const SpanBlock& block, int64_t b) {
        worker.share(int64_t(pieces_.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const Item& item = items_[pieces_[i].item];
                if (pieces_[i].chunk < first_chunk(block, item)) continue;
                float* room = own(worker) + kAloneTokens * shape_.hidden;
                float* work = room + round_up(rows_per_item_ * shape_.head_dim, 16);
                kernels_.attend(cached_head(block, b, item), queries(item, room), pieces_[i].chunk, partial(i), work);
            }
        });
        worker.share(int64_t(items_.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const Item& item = items_[i];
                const int64_t first = first_chunk(block, item);
                const Attended all = partial(item.piece + first);
                for (int64_t chunk = first + 1; chunk <= last_chunk(item); chunk++) {
                    kernels_.merge(partial(item.piece + chunk), item.n_tokens * group_, shape_.head_dim, all);
                }
                finish(item, all);
            }
        });
    }

    Attended partial(int64_t piece) const { return attended_at(partials_ + piece * partial_floats_); }

    void finish(const Item& item, const Attended& all) {
        float* out = attended_ + item.token * output_width_ + item.head * group_ * shape_.head_dim;
        kernels_.finish(all, item.n_tokens * group_, shape_.head_dim, group_, out, output_width_);
    }

    const SpanCall& call_;
    const SpanShape& shape_;
    const SpanKernels& kernels_;
    const int64_t n_workers_;
    int64_t group_, tokens_per_item_, rows_per_item_, heads_width_, output_width_, window_tokens_;
    std::vector<Token> all_;

    // Of the window.
    const Token* tokens_ = nullptr;
    int64_t n_tokens_ = 0;
    float* hidden_ = nullptr;
    std::vector<Item> items_;
    std::vector<Piece> pieces_;
    bool split_ = false, one_each_ = false;

    // In the scratch.
    float *normed_ = nullptr, *heads_ = nullptr, *attended_ = nullptr, *inner_ = nullptr, *own_ = nullptr,
          *partials_ = nullptr;
    int64_t own_floats_ = 0, partial_floats_ = 0;
    Scratch scratch_{};
};

}  // namespace
}  // namespace petalite

int64_t petalite_span_step(petalite::Team* team, const petalite::SpanCall* call) {
    petalite::Step step(team, *call);
    step.take_window(0);
    const int64_t needed = step.lay_out();
    if (needed > call->scratch_bytes) return needed;
    for (int64_t first = 0; first < step.n_tokens();) {
        if (first) step.take_window(first);
        const auto job = [](petalite::Worker& worker, void* context) {
            static_cast<petalite::Step*>(context)->run(worker);
        };
        petalite::team_run(team, job, &step);
        first += step.window_tokens();
    }
    return 0;
}
