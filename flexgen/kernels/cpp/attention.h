// Decode attention for one variant: one pass over K and V with a running softmax in float32.
//
// A block of tokens is scored against up to MAX_HEADS query heads, then its values are summed. Meanwhile K and
// V of the next block are prefetched a little at a time, so that the memory never waits for the arithmetic.
// Scores are laid out by token, then head, so that a vector of them belongs to LANES / HEADS tokens and softmax
// needs no shuffling.
#include "blocks.h"
#include "packed.h"

namespace VARIANT {
namespace attention {

// How keys of type T meet queries: widened to float32, unless the variant has something better.
template <class T>
struct Dot {
    typedef float Query;
    typedef Vec Operand;
    static constexpr int64_t STEP = LANES;
    INLINE static Operand key(const T *k) { return load(k); }
    INLINE static Operand key_part(const T *k, int64_t count) { return load_part(k, count); }
    INLINE static Operand query(const Query *q) { return load(q); }
    INLINE static Vec add(Operand k, Operand q, Vec sum) { return fma(k, q, sum); }
};

#ifdef FLEXGEN_DOT_BF16
template <>
struct Dot<Bf16> {
    typedef Bf16 Query;
    typedef __m512i Operand;
    static constexpr int64_t STEP = 2 * LANES;
    INLINE static Operand key(const Bf16 *k) { return _mm512_loadu_si512(k); }
    INLINE static Operand key_part(const Bf16 *k, int64_t count) {
        return _mm512_maskz_loadu_epi16((1u << count) - 1, k);
    }
    INLINE static Operand query(const Bf16 *q) { return _mm512_loadu_si512(q); }
    INLINE static Vec add(Operand k, Operand q, Vec sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)k, (__m512bh)q);
    }
};
#endif

template <class T, int HEADS>
INLINE void score(const T *k, Heads &heads, const Pass &pass) {
    constexpr int TOKENS = LANES / HEADS;
    const auto *q = heads.queries(typename Dot<T>::Query());
    const int64_t whole = pass.dim / Dot<T>::STEP * Dot<T>::STEP, token_bytes = pass.dim * sizeof(T);
    for (int64_t begin = 0; begin < pass.tokens; begin += TOKENS) {
        prefetch(pass.ahead, begin * token_bytes, std::min(begin + TOKENS, pass.tokens) * token_bytes);
        const T *from[TOKENS];  // what lies beyond the last token may not be read
        for (int t = 0; t < TOKENS; ++t) from[t] = k + std::min(begin + t, pass.tokens - 1) * pass.dim;
        Vec dots[LANES];
        for (Vec &dot : dots) dot = Vec{};
        for (int64_t at = 0; at < whole; at += Dot<T>::STEP) {
            for (int t = 0; t < TOKENS; ++t) {
                const auto key = Dot<T>::key(from[t] + at);
                for (int h = 0; h < HEADS; ++h)
                    dots[t * HEADS + h] =
                        Dot<T>::add(key, Dot<T>::query(q + h * pass.padded + at), dots[t * HEADS + h]);
            }
        }
        if (whole < pass.dim) {
            for (int t = 0; t < TOKENS; ++t) {
                const auto key = Dot<T>::key_part(from[t] + whole, pass.dim - whole);
                for (int h = 0; h < HEADS; ++h)
                    dots[t * HEADS + h] =
                        Dot<T>::add(key, Dot<T>::query(q + h * pass.padded + whole), dots[t * HEADS + h]);
            }
        }
        store(pass.scores + begin * HEADS, sums(dots) * pass.scale);
    }
    for (int64_t i = pass.tokens * HEADS; i % LANES; ++i) pass.scores[i] = -INFINITY;
}

// Scores to exponentials below the running maximum; returns by how much older sums shrink.
template <int HEADS>
INLINE void exponentials(Heads &heads, const Pass &pass, float *shrink) {
    const int64_t used = pass.tokens * HEADS;
    Vec largest = raw<Vec>(pass.scores);
    for (int64_t i = LANES; i < used; i += LANES) largest = larger(raw<Vec>(pass.scores + i), largest);
    float lanes[LANES], old[LANES] = {};
    store(lanes, largest);
    for (int h = 0; h < HEADS; ++h) {
        old[h] = heads.maximum[h];
        for (int i = h; i < LANES; i += HEADS)
            if (!(lanes[i] <= heads.maximum[h])) heads.maximum[h] = lanes[i];  // NaN as well
    }
    for (int i = 0; i < LANES; ++i) lanes[i] = heads.maximum[i % HEADS];
    const Vec maximum = raw<Vec>(lanes);
    store(old, exponential(raw<Vec>(old) - maximum));
    Vec total = {};
    for (int64_t i = 0; i < used; i += LANES) {
        const Vec e = exponential(raw<Vec>(pass.scores + i) - maximum);
        store(pass.scores + i, e);
        total += e;
    }
    store(lanes, total);
    for (int h = 0; h < HEADS; ++h) {
        shrink[h] = old[h];
        heads.total[h] *= old[h];
        for (int i = h; i < LANES; i += HEADS) heads.total[h] += lanes[i];
    }
}

// Add WIDE vectors of the values, from element `at` on. PART: the last, narrower one.
template <class T, int HEADS, int WIDE, bool PART>
INLINE void add_columns(const T *v, Heads &heads, const Pass &pass, const float *shrink, int64_t at) {
    Vec sum[HEADS][WIDE];
    for (int h = 0; h < HEADS; ++h)
        for (int w = 0; w < WIDE; ++w)
            sum[h][w] = raw<Vec>(&heads.sum[h * pass.padded + at + w * LANES]) * shrink[h];
    const int64_t token_bytes = pass.dim * sizeof(T);
    for (int64_t t = 0; t < pass.tokens; ++t) {
        const int64_t ahead = t * token_bytes + at * (int64_t)sizeof(T);
        prefetch(pass.ahead, ahead, ahead + WIDE * LANES * (int64_t)sizeof(T));
        for (int w = 0; w < WIDE; ++w) {
            const T *from = v + t * pass.dim + at + w * LANES;
            const Vec value = PART ? load_part(from, pass.dim - at) : load(from);
            for (int h = 0; h < HEADS; ++h)
                sum[h][w] = fma(value, splat(pass.scores[t * HEADS + h]), sum[h][w]);
        }
    }
    for (int h = 0; h < HEADS; ++h)
        for (int w = 0; w < WIDE; ++w) store(&heads.sum[h * pass.padded + at + w * LANES], sum[h][w]);
}

// As many columns at a time as there are registers for, then half as many, ...
template <class T, int HEADS, int WIDE>
TARGET inline void add_values(const T *v, Heads &heads, const Pass &pass, const float *shrink, int64_t at) {
    for (; at + WIDE * LANES <= pass.dim; at += WIDE * LANES)
        add_columns<T, HEADS, WIDE, false>(v, heads, pass, shrink, at);
    if constexpr (WIDE > 1)
        add_values<T, HEADS, WIDE / 2>(v, heads, pass, shrink, at);
    else if (at < pass.dim)
        add_columns<T, HEADS, 1, true>(v, heads, pass, shrink, at);
}

// K: the elements of the pages, Codes<BITS> where they are packed.
template <class K, int HEADS>
TARGET void attend_block(const Block &block, const Block *next, Heads &heads, Pass pass) {
    float shrink[MAX_HEADS];
    pass.ahead = next ? next->k : nullptr;
    if constexpr (bits_of<K> != 0)
        score_packed<bits_of<K>, HEADS>(block.k, heads, pass);
    else
        score<K, HEADS>((const K *)block.k, heads, pass);
    exponentials<HEADS>(heads, pass, shrink);
    pass.ahead = next ? next->v : nullptr;
    constexpr int WIDE = SUM_REGISTERS / HEADS;
    if constexpr (bits_of<K> != 0)
        add_packed<bits_of<K>, HEADS>(block.v, heads, pass, shrink);
    else
        add_values<K, HEADS, WIDE>((const K *)block.v, heads, pass, shrink, 0);
}

template <class K>
TARGET void attend_heads(const Block &block, const Block *next, Heads &heads, const Pass &pass) {
    if (heads.count == 1)
        attend_block<K, 1>(block, next, heads, pass);
    else if (heads.count == 2)
        attend_block<K, 2>(block, next, heads, pass);
    else if (heads.count <= 4)
        attend_block<K, 4>(block, next, heads, pass);
    else
        attend_block<K, MAX_HEADS>(block, next, heads, pass);
}

template <class T>
TARGET void begin_task(Heads &heads, const T *q, const Pass &pass) {
    for (int h = 0; h < heads.count; ++h) {
        for (int64_t at = 0; at < pass.dim; at += LANES) {
            const int64_t count = std::min<int64_t>(LANES, pass.dim - at);
            store(&heads.q[h * pass.padded + at], load_part(q + h * pass.dim + at, count));
        }
        if (sizeof(T) == sizeof(Bf16))  // only read where T is Bf16
            memcpy(&heads.q_bf16[h * pass.padded], q + h * pass.dim, pass.dim * sizeof(Bf16));
    }
    std::fill(heads.sum.begin(), heads.sum.end(), 0.0f);
    std::fill_n(heads.maximum, MAX_HEADS, -INFINITY);
    std::fill_n(heads.total, MAX_HEADS, 0.0f);
    if (pass.packing) begin_packed(heads, pass);
}

template <class T>
TARGET void write(T *out, const float *sum, float factor, int64_t dim) {
    for (int64_t at = 0; at < dim; at += LANES) {
        const int64_t count = std::min<int64_t>(LANES, dim - at);
        store_part(out + at, load_part(sum + at, count) * factor, count);
    }
}

// T: the elements of queries and of the answer.
template <class T, class K>
TARGET void attend(Attention &job) {
    const int64_t dim = job.head_dim, group = job.group();
    Pass pass = {};
    pass.dim = dim;
    pass.padded = (dim + QUERY_PADDING - 1) / QUERY_PADDING * QUERY_PADDING;
    pass.scale = job.scale;
    std::vector<float> scores(BLOCK_TOKENS * MAX_HEADS + LANES);
    pass.scores = scores.data();
    std::optional<Packing> packing;
    if constexpr (bits_of<K> != 0) pass.packing = &packing.emplace(job);
    const int64_t sum_width = packing ? packing->width() : pass.padded;
    std::vector<Heads> parts((group + MAX_HEADS - 1) / MAX_HEADS);
    for (size_t n = 0; n < parts.size(); ++n) {
        parts[n].count = (int)std::min<int64_t>(MAX_HEADS, group - (int64_t)n * MAX_HEADS);
        parts[n].q.resize(MAX_HEADS * pass.padded);
        parts[n].sum.resize(MAX_HEADS * sum_width);
        parts[n].q_bf16.resize(MAX_HEADS * pass.padded);
    }

    Blocks blocks(job, job.head_bytes);
    Block block, next;
    for (bool more = blocks.next(block); more; block = next) {
        more = blocks.next(next);
        pass.tokens = block.tokens;
        for (size_t n = 0; n < parts.size(); ++n) {
            const int64_t head = block.item * group + (int64_t)n * MAX_HEADS;
            if (block.first) begin_task(parts[n], (const T *)job.q + head * dim, pass);
            // The first heads prefetch for all.
            attend_heads<K>(block, more && n == 0 ? &next : nullptr, parts[n], pass);
            if (!block.last) continue;
            for (int h = 0; h < parts[n].count; ++h) {
                const float *sum = packing ? unpacked(parts[n], pass, h) : &parts[n].sum[h * pass.padded];
                if (job.splits == 1) {
                    write((T *)job.out + (head + h) * dim, sum, 1.0f / parts[n].total[h], dim);
                    continue;
                }
                const int64_t within = (int64_t)n * MAX_HEADS + h;
                float *partial = &job.partial[block.task * job.partial_size() + within * (2 + dim)];
                partial[0] = parts[n].maximum[h];
                partial[1] = parts[n].total[h];
                memcpy(partial + 2, sum, dim * sizeof(float));
            }
        }
    }
}

template <class T>
TARGET void merge(const Attention &job) {
    const int64_t dim = job.head_dim, group = job.group();
    std::vector<float> sum(dim);
    for (int64_t item = 0; item < job.items(); ++item) {
        for (int64_t h = 0; h < group; ++h) {
            const float *first = &job.partial[item * job.splits * job.partial_size() + h * (2 + dim)];
            float maximum = -INFINITY, total = 0.0f;
            for (int64_t s = 0; s < job.splits; ++s) {
                const float *partial = first + s * job.partial_size();
                if (partial[1] != 0.0f && !(partial[0] <= maximum)) maximum = partial[0];
            }
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t s = 0; s < job.splits; ++s) {
                const float *partial = first + s * job.partial_size();
                if (partial[1] == 0.0f) continue;  // nothing but padding
                const float factor = std::exp(partial[0] - maximum);
                total += factor * partial[1];
                for (int64_t i = 0; i < dim; ++i) sum[i] += factor * partial[2 + i];
            }
            if (total != 0.0f) write((T *)job.out + (item * group + h) * dim, sum.data(), 1.0f / total, dim);
        }
    }
}

template <class T>
void attend_type(Attention &job) {
    if (job.bits == 4) return attend<T, Codes<4>>(job);
    if (job.bits == 8) return attend<T, Codes<8>>(job);
    attend<T, T>(job);
}

void attend_any(Attention &job) {
    if (job.type == Type::float32) return attend_type<float>(job);
    if (job.type == Type::bfloat16) return attend_type<Bf16>(job);
    attend_type<Half>(job);
}

void merge_any(const Attention &job) {
    if (job.type == Type::float32) return merge<float>(job);
    if (job.type == Type::bfloat16) return merge<Bf16>(job);
    merge<Half>(job);
}

}  // namespace attention
}  // namespace VARIANT
