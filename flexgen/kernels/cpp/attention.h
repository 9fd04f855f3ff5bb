// Decode attention for one variant: one pass over K and V with a running softmax in float32.
//
// A block of tokens is scored against up to MAX_HEADS queries, then its values are summed. Meanwhile, K and V of
// the next block are prefetched in small parts, so that memory reads never wait for the arithmetic. Half of V is
// prefetched during the scores, which take twice as long as the sums, so that the memory traffic is even.
// Scores are stored by token, then by query: a vector of scores belongs to LANES / HEADS tokens, and softmax needs no
// shuffles. The new tokens of a row are queries like the query heads of a K/V head. Only in the last blocks, and in the
// first ones with a window, do they attend to different tokens.
#include "blocks.h"
#include "packed.h"
#include "softmax.h"

namespace VARIANT {
namespace attention {

// The multiplication of keys of type T with queries: widen a run to float32, unless the variant has a better way.
template <class T>
struct Dot {
    typedef float Query;
    typedef Vec Operand;
    static constexpr int OPERANDS = Run<T>::VECTORS;
    static constexpr int64_t STEP = OPERANDS * LANES, REST = LANES;
    INLINE static void keys(const T *k, Operand (&to)[OPERANDS]) { Run<T>::widen(k, to); }
    INLINE static Operand rest(const T *k, int64_t count) {  // the rest after whole runs, up to REST elements
        return count < LANES ? load_part(k, count) : load(k);
    }
    INLINE static Operand query(const Query *q) { return load(q); }
    INLINE static Vec add(Operand k, Operand q, Vec sum) { return fma(k, q, sum); }
};

#ifdef FLEXGEN_DOT_BF16
template <>
struct Dot<Bf16> {
    typedef Bf16 Query;
    typedef __m512i Operand;
    static constexpr int OPERANDS = 1;
    static constexpr int64_t STEP = 2 * LANES, REST = STEP;
    INLINE static void keys(const Bf16 *k, Operand (&to)[1]) { to[0] = _mm512_loadu_si512(k); }
    INLINE static Operand rest(const Bf16 *k, int64_t count) {
        return _mm512_maskz_loadu_epi16((1u << count) - 1, k);
    }
    INLINE static Operand query(const Bf16 *q) { return _mm512_loadu_si512(q); }
    INLINE static Vec add(Operand k, Operand q, Vec sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)k, (__m512bh)q);
    }
};
#endif

template <class T, int HEADS>
APART void score(const T *k, const Heads &heads, const Pass &pass) {
    typedef Dot<T> Dots;
    constexpr int TOKENS = LANES / HEADS;
    const auto *q = heads.queries(typename Dots::Query());
    const int64_t dim = pass.dim, padded = pass.padded, tokens = pass.tokens;
    const int64_t whole = dim / Dots::STEP * Dots::STEP, token_bytes = dim * sizeof(T);
    const char *ahead = pass.ahead, *early = pass.early;
    float *scores = pass.scores;
    for (int64_t begin = 0; begin < tokens; begin += TOKENS) {
        const int64_t end = std::min(begin + TOKENS, tokens);
        prefetch(ahead, begin * token_bytes, end * token_bytes);
        prefetch(early, begin * token_bytes / 2, end * token_bytes / 2);
        const T *from[TOKENS];  // memory beyond the last token must not be read
        UNROLLED for (int t = 0; t < TOKENS; ++t) from[t] = k + std::min(begin + t, tokens - 1) * dim;
        Vec dots[LANES];
        UNROLLED for (Vec &dot : dots) dot = Vec{};
        for (int64_t at = 0; at < whole; at += Dots::STEP) {
            UNROLLED for (int t = 0; t < TOKENS; ++t) {
                typename Dots::Operand keys[Dots::OPERANDS];
                Dots::keys(from[t] + at, keys);
                UNROLLED for (int n = 0; n < Dots::OPERANDS; ++n)
                    UNROLLED for (int h = 0; h < HEADS; ++h) {
                        Vec &dot = dots[t * HEADS + h];
                        dot = Dots::add(keys[n], Dots::query(q + h * padded + at + n * LANES), dot);
                    }
            }
        }
        for (int64_t at = whole; at < dim; at += Dots::REST) {
            UNROLLED for (int t = 0; t < TOKENS; ++t) {
                const auto key = Dots::rest(from[t] + at, dim - at);
                UNROLLED for (int h = 0; h < HEADS; ++h) {
                    Vec &dot = dots[t * HEADS + h];
                    dot = Dots::add(key, Dots::query(q + h * padded + at), dot);
                }
            }
        }
        store(scores + begin * HEADS, sums(dots) * pass.scale);
    }
    for (int64_t i = tokens * HEADS; i % LANES; ++i) scores[i] = -INFINITY;
}

// Add WIDE vectors of the values, starting at element `at`: whole runs, then at most one other vector.
// PART: the last vector is partial.
template <class T, int HEADS, int WIDE, bool PART>
APART void add_columns(const T *v, Heads &heads, const Pass &pass, const float *shrink, int64_t at) {
    constexpr int VECTORS = Run<T>::VECTORS, IN_RUNS = PART ? 0 : WIDE / VECTORS * VECTORS;
    const int64_t dim = pass.dim, padded = pass.padded;
    float *sums = heads.sum.data() + at;
    Vec sum[HEADS][WIDE];
    UNROLLED for (int h = 0; h < HEADS; ++h)
        UNROLLED for (int w = 0; w < WIDE; ++w)
            sum[h][w] = raw<Vec>(sums + h * padded + w * LANES) * shrink[h];
    const char *ahead = pass.ahead ? pass.ahead + at * (int64_t)sizeof(T) / 2 : nullptr;
    const float *p = pass.scores, *const end = p + pass.tokens * HEADS;
    for (v += at; p < end; p += HEADS, v += dim) {
        if (ahead) {
            prefetch(ahead, 0, WIDE * LANES * (int64_t)sizeof(T) / 2);  // half a block, like `early`
            ahead += dim * (int64_t)sizeof(T) / 2;
        }
        UNROLLED for (int w = 0; w < IN_RUNS; w += VECTORS) {
            Vec values[VECTORS];
            Run<T>::widen(v + w * LANES, values);
            UNROLLED for (int n = 0; n < VECTORS; ++n)
                UNROLLED for (int h = 0; h < HEADS; ++h)
                    sum[h][w + n] = fma(values[n], splat(p[h]), sum[h][w + n]);
        }
        if constexpr (IN_RUNS < WIDE) {
            const T *from = v + IN_RUNS * LANES;
            const Vec value = PART ? load_part(from, dim - at) : load(from);
            UNROLLED for (int h = 0; h < HEADS; ++h)
                sum[h][IN_RUNS] = fma(value, splat(p[h]), sum[h][IN_RUNS]);
        }
    }
    UNROLLED for (int h = 0; h < HEADS; ++h)
        UNROLLED for (int w = 0; w < WIDE; ++w) store(sums + h * padded + w * LANES, sum[h][w]);
}

// Use as many columns at a time as fit in registers, then half as many, and so on. A single last vector joins the step
// before it: alone, it would wait for its own sums.
template <class T, int HEADS, int WIDE>
TARGET inline void add_values(const T *v, Heads &heads, const Pass &pass, const float *shrink, int64_t at) {
    for (; at + WIDE * LANES <= pass.dim; at += WIDE * LANES) {
        if constexpr (WIDE > 1 && HEADS * (WIDE + 1) <= SUM_REGISTERS * 3 / 2)
            if ((pass.dim - at) / LANES == WIDE + 1) {
                add_columns<T, HEADS, WIDE + 1, false>(v, heads, pass, shrink, at);
                at += LANES;
                continue;
            }
        add_columns<T, HEADS, WIDE, false>(v, heads, pass, shrink, at);
    }
    if constexpr (WIDE > 1)
        add_values<T, HEADS, WIDE / 2>(v, heads, pass, shrink, at);
    else if (at < pass.dim)
        add_columns<T, HEADS, 1, true>(v, heads, pass, shrink, at);
}

// K: the element type of the pages; Codes<BITS> for packed pages.
template <class K, int HEADS>
TARGET void attend_block(const Block &block, const Block *next, Heads &heads, Pass pass) {
    float shrink[LANES];
    pass.ahead = next ? next->k : nullptr;
    if constexpr (bits_of<K> != 0) {
        score_packed<bits_of<K>, HEADS>(block.k, heads, pass);
        if (pass.adjusts) adjust<HEADS>(heads, pass);
        if (pass.hides) hide<HEADS>(heads, pass);
        exponentials<HEADS>(heads, pass, shrink);
        pass.ahead = next ? next->v : nullptr;
        add_packed<bits_of<K>, HEADS>(block.v, heads, pass, shrink);
    } else {
        constexpr int WIDE = SUM_REGISTERS / HEADS;
        pass.early = next ? next->v : nullptr;
        score<K, HEADS>((const K *)block.k, heads, pass);
        if (pass.adjusts) adjust<HEADS>(heads, pass);
        if (pass.hides) hide<HEADS>(heads, pass);
        exponentials<HEADS>(heads, pass, shrink);
        pass.ahead = next ? next->v + pass.tokens * pass.dim * (int64_t)sizeof(K) / 2 : nullptr;
        add_values<K, HEADS, WIDE>((const K *)block.v, heads, pass, shrink, 0);
    }
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

// K: the element type of the pages. Queries are widened like the elements. query_at(h): the address of query h.
template <class K, class Queries>
TARGET void begin_task(Heads &heads, const Queries &query_at, const Pass &pass) {
    typedef std::remove_cv_t<std::remove_pointer_t<decltype(query_at(0))>> T;
    const int64_t runs = bits_of<K> ? 0 : in_runs<T>(pass.dim);
    for (int h = 0; h < heads.count; ++h) {
        const T *q = query_at(h);
        float *wide = &heads.q[h * pass.padded];
        for (int64_t at = 0; at < runs; at += Run<T>::VECTORS * LANES) {
            Vec run[Run<T>::VECTORS];
            Run<T>::widen(q + at, run);
            for (int n = 0; n < Run<T>::VECTORS; ++n) store(wide + at + n * LANES, run[n]);
        }
        for (int64_t at = runs; at < pass.dim; at += LANES) {
            const int64_t count = pass.dim - at;
            store(wide + at, count < LANES ? load_part(q + at, count) : load(q + at));
        }
        if (sizeof(T) == sizeof(Bf16))  // only read if T is Bf16
            memcpy(&heads.q_bf16[h * pass.padded], q, pass.dim * sizeof(Bf16));
    }
    std::fill(heads.sum.begin(), heads.sum.end(), 0.0f);
    std::fill_n(heads.maximum, LANES, -INFINITY);
    std::fill_n(heads.total, LANES, 0.0f);
    if (pass.packing) begin_packed(heads, pass);
}

// The sums of head h over values of type T: (head_dim,), in element order.
template <class T>
TARGET const float *in_order(Heads &heads, const Pass &pass, int h) {
    constexpr int VECTORS = Run<T>::VECTORS;
    const float *sum = &heads.sum[h * pass.padded];
    if (VECTORS == 1) return sum;
    heads.ordered.assign(sum, sum + pass.dim);
    for (int64_t run = 0; run < in_runs<T>(pass.dim); run += VECTORS * LANES)
        for (int n = 0; n < VECTORS; ++n)
            for (int i = 0; i < LANES; ++i)
                heads.ordered[run + i * VECTORS + n] = sum[run + n * LANES + i];
    return heads.ordered.data();
}

// The slopes and the positions of a set of queries of an item that begins with its query `first`.
inline void begin_positions(Heads &heads, const Attention &job, int64_t item, int64_t first) {
    for (int i = 0; i < LANES; ++i) {
        const int64_t n = first + std::min(i % heads.width(), heads.count - 1), token = job.token(n);
        const int64_t later = job.fresh - 1 - token, position = job.end(item) - 1 - later;
        heads.slopes[i] = job.slopes ? job.slopes[job.head(item, n)] : 0.0f;
        heads.later[i] = (int32_t)later;
        heads.reach[i] = (int32_t)(job.start(item, token) - position);
    }
}

// The exponential of a head's sink, relative to the maximum of a query's scores.
inline float sink(const Attention &job, int64_t head, float maximum) {
    return job.sinks ? std::exp(job.sinks[head] - maximum) : 0.0f;
}

// The log of the sum of the exponentials of a query's scores and its sink. total: of the scores, relative to the
// maximum.
inline float log_sum_exp(const Attention &job, int64_t head, float maximum, float total) {
    if (!job.sinks) return maximum + std::log(total);
    const float sink = job.sinks[head], largest = std::max(maximum, sink);
    return largest + std::log(total * std::exp(maximum - largest) + std::exp(sink - largest));
}

template <class T>
TARGET void write(T *out, const float *sum, float factor, int64_t dim) {
    int64_t at = 0;
    for (; at + LANES <= dim; at += LANES) store(out + at, load(sum + at) * factor);
    if (at < dim) store_part(out + at, load_part(sum + at, dim - at) * factor, dim - at);
}

// Write the result of query n of an item, from the sums over its tokens.
template <class T>
TARGET void finish(const Attention &job, int64_t item, int64_t n, const float *sum, float maximum, float total) {
    const int64_t dim = job.head_dim, at = job.place(item, n) * dim, head = job.head(item, n);
    const float factor = 1.0f / (total + sink(job, head, maximum));
    if (!job.lse) return write((T *)job.out + at, sum, factor, dim);
    write((float *)job.out + at, sum, factor, dim);
    job.lse[job.lse_place(item, n)] = log_sum_exp(job, head, maximum, total);
}

// T: the element type of the queries and the output.
template <class T, class K>
TARGET void attend(Attention &job) {
    const int64_t dim = job.head_dim, group = job.group();
    Pass pass = {};
    pass.dim = dim;
    pass.padded = (dim + QUERY_PADDING - 1) / QUERY_PADDING * QUERY_PADDING;
    pass.scale = job.scale;
    pass.cap = job.cap;
    pass.adjusts = job.cap != 0.0f || job.slopes;
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
        pass.distance = block.begin - (job.end(block.item) - 1);
        const int64_t later = job.fresh - 1;  // than the first query
        pass.hides = later && (pass.distance + block.tokens - 1 + later > 0 || block.begin < job.start(block.item, later));
        for (size_t n = 0; n < parts.size(); ++n) {
            const int64_t first = (int64_t)n * MAX_HEADS;
            if (block.first) {
                const auto at = [&](int h) { return (const T *)job.q + job.place(block.item, first + h) * dim; };
                begin_task<K>(parts[n], at, pass);
                if (pass.adjusts || later) begin_positions(parts[n], job, block.item, first);
            }
            // The first set of queries prefetches for all.
            attend_heads<K>(block, more && n == 0 ? &next : nullptr, parts[n], pass);
            if (!block.last) continue;
            for (int h = 0; h < parts[n].count; ++h) {
                const float *sum = packing ? unpacked(parts[n], pass, h) : in_order<T>(parts[n], pass, h);
                const float total = parts[n].total_of(h);
                if (job.splits == 1) {
                    finish<T>(job, block.item, first + h, sum, parts[n].maximum[h], total);
                    continue;
                }
                float *partial = &job.partial[block.task * job.partial_size() + (first + h) * (2 + dim)];
                partial[0] = parts[n].maximum[h];
                partial[1] = total;
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
        for (int64_t n = 0; n < group; ++n) {
            const float *first = &job.partial[item * job.splits * job.partial_size() + n * (2 + dim)];
            float maximum = -INFINITY, total = 0.0f;
            for (int64_t s = 0; s < job.splits; ++s) {
                const float *partial = first + s * job.partial_size();
                if (partial[1] != 0.0f && !(partial[0] <= maximum)) maximum = partial[0];
            }
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t s = 0; s < job.splits; ++s) {
                const float *partial = first + s * job.partial_size();
                if (partial[1] == 0.0f) continue;  // no token of the row
                const float factor = std::exp(partial[0] - maximum);
                total += factor * partial[1];
                for (int64_t i = 0; i < dim; ++i) sum[i] += factor * partial[2 + i];
            }
            if (total == 0.0f) continue;
            finish<T>(job, item, n, sum.data(), maximum, total);
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
