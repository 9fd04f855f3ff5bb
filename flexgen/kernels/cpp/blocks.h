// Data of decode attention for all page formats: blocks of tokens, sets of queries, one pass.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

namespace VARIANT {
namespace attention {

constexpr int MAX_HEADS = LANES < 8 ? LANES : 8;
constexpr int64_t BLOCK_BYTES = 8192;  // of K: K and V of two blocks fit in the L1 cache
constexpr int64_t BLOCK_TOKENS = 128;  // the maximum
constexpr int64_t QUERY_PADDING = 2 * LANES;  // queries and sums are padded with zeros to a multiple of this

struct Block {
    int64_t task, item, tokens;
    int64_t begin;  // the position of its first token
    const char *k, *v;
    bool first, last;  // the first or the last block of its task
};

// The blocks of the tasks that this thread claims, in reading order.
class Blocks {
public:
    Blocks(Attention &job, int64_t token_bytes) : job_(job), token_bytes_(token_bytes) {
        const int64_t tokens = BLOCK_BYTES / token_bytes / LANES * LANES;
        block_tokens_ = std::min(BLOCK_TOKENS, std::max<int64_t>(LANES, tokens));
    }

    bool next(Block &block) {
        const bool first = token_ >= end_;
        if (first && !claim()) return false;
        while (job_.pages[page_].begin + job_.pages[page_].tokens <= token_) ++page_;
        const Page &page = job_.pages[page_];
        const int64_t within = token_ - page.begin, offset = (item_ * page.tokens + within) * token_bytes_;
        block.task = task_;
        block.item = item_;
        block.begin = token_;
        block.tokens = std::min({block_tokens_, end_ - token_, page.tokens - within});
        block.k = (const char *)page.k + offset;
        block.v = (const char *)page.v + offset;
        token_ += block.tokens;
        block.first = first;
        block.last = token_ == end_;
        return true;
    }

private:
    bool claim() {  // claims the next task with a token of its row
        do {
            task_ = job_.claimed.fetch_add(1, std::memory_order_relaxed);
            if (task_ >= job_.tasks()) return false;
            item_ = task_ / job_.splits;
            const int64_t begin = task_ % job_.splits * job_.split_tokens;
            end_ = std::min(begin + job_.split_tokens, job_.end(item_));
            token_ = std::max(begin, job_.start(item_));
        } while (token_ >= end_);
        page_ = 0;
        return true;
    }

    Attention &job_;
    int64_t token_bytes_, block_tokens_;
    int64_t task_ = 0, item_ = 0, token_ = 0, end_ = 0;
    size_t page_ = 0;
};

// Queries of one item that share a softmax pass: HEADS of them, a power of two. They are of different query heads, and
// with several new tokens also of different tokens. Only `count` are real; the others are zero.
struct Heads {
    int count;
    std::vector<float> q, sum;  // (HEADS, padded), in the order of runs (vectors.h)
    std::vector<Bf16> q_bf16;
    std::vector<float> ordered;  // (head_dim,)
    // For packed pages, where `sum` is in operand order:
    std::vector<float> operands;  // (HEADS, width)
    std::vector<float> query_sums;  // (groups, LANES), in the order of a score vector: the factors of the minimums
    std::vector<float> offsets;  // (groups, MAX_HEADS): the contributions of the minimums
    // In the order of a score vector:
    float slopes[LANES];  // zero without ALiBi
    int32_t later[LANES];  // the number of new tokens after that of the query
    int32_t reach[LANES];  // from the position of the query to that of the first token that it attends to: at most 0
    float maximum[LANES], total[LANES];  // for each query, and for each lane

    int width() const { return count <= 2 ? count : count <= 4 ? 4 : MAX_HEADS; }  // HEADS
    float total_of(int h) const {
        float sum = 0.0f;
        for (int i = h; i < LANES; i += width()) sum += total[i];
        return sum;
    }
    const float *queries(float) const { return q.data(); }
    const Bf16 *queries(Bf16) const { return q_bf16.data(); }
};

struct Packing;

// A pass over one block for one set of queries.
struct Pass {
    const char *ahead;  // data to prefetch while this block's K or V is read; null for none
    const char *early;  // data of which half is prefetched while K is read, which takes longer; null for none
    int64_t dim, padded, tokens;
    float scale;
    bool adjusts;  // whether scores have a cap or a bias
    float cap;
    bool hides;  // whether a query does not attend to all tokens of the block
    int64_t distance;  // from the position of the last query to that of the block's first token: at most 0
    float *scores;  // (tokens, HEADS), with space for LANES more
    Packing *packing;  // for packed pages; null for plain pages
};

INLINE void prefetch(const char *ahead, int64_t begin, int64_t end) {
    if (!ahead) return;
    for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(ahead + at);
}

}  // namespace attention
}  // namespace VARIANT
