// Attention over keys and values that all rows share, and attention of the tokens of a prompt, for one variant.
//
// Each number of K and V is used for many queries, so the time is that of the arithmetic, not of the memory. A task is a
// K/V head and a block of queries: those of several rows, of all query heads that share the K/V head. They are in the
// lanes of vectors, and keys and values are broadcast to all lanes. So the products need no sums over lanes, the softmax
// needs no shuffles, and K and V are used in their own order. The queries of a task are divided into panels of one or
// two vectors. TOKENS tokens are converted once, and used by all panels while they are in the cache.
//
// Operands are words of 32 bits: a number in float32, or with instructions for it a pair in bfloat16. A pair of keys or
// queries is of adjacent columns, a pair of values or weights is of adjacent tokens. Sums are in float32.

namespace VARIANT {
namespace prefix {

constexpr int WIDE = 2;  // vectors of a panel, at most
constexpr int64_t TOKENS = 64;  // a multiple of SUM_REGISTERS

// Queries whose sums are in registers together. Arrays by lane are padded with values of queries that are not written.
struct Panel {
    int64_t count;  // of queries
    int vectors;  // 1 or 2
    float *q, *sum;  // words of the queries (head_dim, lanes), and sums of values (padded head_dim, lanes)
    std::vector<float> room;  // for both
    float maximum[WIDE * LANES], total[WIDE * LANES];
    float slopes[WIDE * LANES], positions[WIDE * LANES];
    int32_t first[WIDE * LANES], end[WIDE * LANES];  // of the tokens that a query attends to
    int32_t earliest, latest;  // of `first`
    int32_t earliest_end, latest_end;

    int lanes() const { return vectors * LANES; }
};

// Words of keys and values of a block of tokens, with a stride of `padded`.
struct Tile {
    std::vector<float> k, v;
    int64_t begin, tokens, dim, padded;  // padded with zeros to a multiple of SUM_REGISTERS

    explicit Tile(int64_t head_dim) : dim(head_dim) {
        padded = (dim + SUM_REGISTERS - 1) / SUM_REGISTERS * SUM_REGISTERS;
        k.resize(TOKENS * padded);
        v.resize(TOKENS * padded);
    }
};

// Products in float32.
struct Widened {
    static constexpr int NUMBERS = 1;  // in a word

    INLINE static Vec add(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
    template <class T>
    TARGET static void keys(const T *from, int64_t dim, float *to) { linear::widen(from, to, dim); }
    template <class T>
    TARGET static void values(const T *from, int64_t step, int64_t tokens, int64_t dim, int64_t stride, float *to) {
        for (int64_t t = 0; t < tokens; ++t) linear::widen(from + t * step, to + t * stride, dim);
    }
    template <int J>
    INLINE static void weights(float *, int64_t) {}
};

#ifdef FLEXGEN_DOT_BF16
// Products of pairs in bfloat16, to which the exponentials of the scores are rounded.
struct Paired {
    static constexpr int NUMBERS = 2;

    INLINE static Vec add(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    TARGET static void keys(const Bf16 *from, int64_t dim, float *to) {
        to[dim / 2] = 0.0f;  // the last pair may have one number
        memcpy(to, from, dim * sizeof(Bf16));
    }
    TARGET static void values(const Bf16 *from, int64_t step, int64_t tokens, int64_t dim, int64_t stride, float *to) {
        for (int64_t t = 0; t < tokens; t += 2, from += 2 * step, to += stride) {
            for (int64_t d = 0; d < dim; d += LANES) {
                const int64_t count = std::min<int64_t>(LANES, dim - d);
                const Words low = to_words(shorts_part(from + d, count));
                const Words high = t + 1 < tokens ? to_words(shorts_part(from + step + d, count)) : Words{};
                const Vec pairs = (Vec)(low | high << 16);
                count == LANES ? store(to + d, pairs) : store_part(to + d, pairs, count);
            }
        }
    }
    // Convert weights to pairs in their place.
    template <int J>
    TARGET static void weights(float *at, int64_t tokens) {
        Shorts32 order;
        for (int i = 0; i < 2 * LANES; ++i) order[i] = (uint16_t)(i / 2 + i % 2 * LANES);
        for (int64_t t = 0; t < tokens; t += 2) {
            for (int j = 0; j < J; ++j) {
                const Vec first = load(at + (t * J + j) * LANES);
                const Vec second = t + 1 < tokens ? load(at + ((t + 1) * J + j) * LANES) : Vec{};
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
                store(at + (t / 2 * J + j) * LANES, (Vec)_mm512_permutexvar_epi16((__m512i)order, both));
            }
        }
    }

private:
    typedef uint16_t Shorts32 __attribute__((vector_size(64)));
};
#endif

// The scores of SUM_REGISTERS / J tokens with a panel of J vectors. words: of a key.
template <class Kind, int J>
APART void score(const float *k, int64_t stride, const float *q, int64_t words, float scale, float *scores) {
    constexpr int KEYS = SUM_REGISTERS / J;
    Vec sum[KEYS][J];
    UNROLLED for (int i = 0; i < KEYS; ++i)
        UNROLLED for (int j = 0; j < J; ++j) sum[i][j] = Vec{};
    for (const float *const end = k + words; k < end; ++k, q += J * LANES) {
        Vec queries[J];
        UNROLLED for (int j = 0; j < J; ++j) queries[j] = load(q + j * LANES);
        UNROLLED for (int i = 0; i < KEYS; ++i) {
            const Vec key = splat(k[i * stride]);
            UNROLLED for (int j = 0; j < J; ++j) sum[i][j] = Kind::add(sum[i][j], key, queries[j]);
        }
    }
    UNROLLED for (int i = 0; i < KEYS; ++i)
        UNROLLED for (int j = 0; j < J; ++j) store(scores + (i * J + j) * LANES, sum[i][j] * scale);
}

// Add SUM_REGISTERS / J columns of the values, weighted by the exponentials of the scores, to `sums` times `shrink`.
// words: of a column.
template <class Kind, int J>
APART void add(const float *v, int64_t stride, const float *weights, int64_t words, const float *shrink, float *sums) {
    constexpr int COLUMNS = SUM_REGISTERS / J;
    Vec sum[COLUMNS][J];
    UNROLLED for (int i = 0; i < COLUMNS; ++i)
        UNROLLED for (int j = 0; j < J; ++j)
            sum[i][j] = load(sums + (i * J + j) * LANES) * load(shrink + j * LANES);
    for (const float *const end = weights + words * J * LANES; weights < end; weights += J * LANES, v += stride) {
        Vec weight[J];
        UNROLLED for (int j = 0; j < J; ++j) weight[j] = load(weights + j * LANES);
        UNROLLED for (int i = 0; i < COLUMNS; ++i) {
            const Vec value = splat(v[i]);
            UNROLLED for (int j = 0; j < J; ++j) sum[i][j] = Kind::add(sum[i][j], value, weight[j]);
        }
    }
    UNROLLED for (int i = 0; i < COLUMNS; ++i)
        UNROLLED for (int j = 0; j < J; ++j) store(sums + (i * J + j) * LANES, sum[i][j]);
}

// Cap the scores of a tile, and add the bias of ALiBi.
template <int J>
APART void adjust(const PrefixAttention &job, const Panel &panel, const Tile &tile, float *scores) {
    for (int j = 0; j < J; ++j) {
        const Vec slopes = load(panel.slopes + j * LANES);
        Vec distance = splat((float)tile.begin) - load(panel.positions + j * LANES);
        for (int64_t t = 0; t < tile.tokens; ++t, distance += 1.0f) {
            float *at = scores + (t * J + j) * LANES;
            Vec score = load(at);
            if (job.cap != 0.0f) score = attention::capped(score, job.cap);
            store(at, fma(slopes, distance, score));
        }
    }
}

template <int J>
APART void hide(const Panel &panel, const Tile &tile, float *scores) {
    const Vec hidden = splat(-INFINITY);
    for (int j = 0; j < J; ++j) {
        const Ints first = raw<Ints>(panel.first + j * LANES), end = raw<Ints>(panel.end + j * LANES);
        for (int64_t t = 0; t < tile.tokens; ++t) {
            const int32_t token = (int32_t)(tile.begin + t);
            float *at = scores + (t * J + j) * LANES;
            store(at, (first <= token) & (token < end) ? load(at) : hidden);
        }
    }
}

// Convert scores to exponentials relative to the running maximum. `shrink`: the factor for older sums.
template <int J>
APART void exponentials(Panel &panel, int64_t tokens, float *scores, float *shrink) {
    for (int j = 0; j < J; ++j) {
        const Vec before = load(panel.maximum + j * LANES);
        Vec maximum = before;
        float *const begin = scores + j * LANES, *const end = begin + tokens * J * LANES;
        for (const float *at = begin; at < end; at += J * LANES) maximum = larger(load(at), maximum);
        // A query may attend to no token yet: -inf less -inf is no number.
        const Vec base = maximum == -INFINITY ? Vec{} : maximum;
        const Vec shrinks = exponential(before - base);
        Vec total = load(panel.total + j * LANES) * shrinks;
        for (float *at = begin; at < end; at += J * LANES) {
            const Vec e = exponential(load(at) - base);
            store(at, e);
            total += e;
        }
        store(panel.maximum + j * LANES, maximum);
        store(panel.total + j * LANES, total);
        store(shrink + j * LANES, shrinks);
    }
}

template <class Kind, int J>
TARGET void attend_tile(const PrefixAttention &job, Panel &panel, const Tile &tile, float *scores) {
    constexpr int AT_ONCE = SUM_REGISTERS / J, NUMBERS = Kind::NUMBERS;
    const int64_t columns = (tile.dim + NUMBERS - 1) / NUMBERS, rows = (tile.tokens + NUMBERS - 1) / NUMBERS;
    float shrink[WIDE * LANES];
    for (int64_t t = 0; t < tile.tokens; t += AT_ONCE)
        score<Kind, J>(&tile.k[t * tile.padded], tile.padded, panel.q, columns, job.scale, scores + t * J * LANES);
    if (job.cap != 0.0f || job.slopes) adjust<J>(job, panel, tile, scores);
    if (panel.latest > tile.begin || panel.earliest_end < tile.begin + tile.tokens) hide<J>(panel, tile, scores);
    exponentials<J>(panel, tile.tokens, scores, shrink);
    Kind::template weights<J>(scores, tile.tokens);
    for (int64_t d = 0; d < tile.dim; d += AT_ONCE)
        add<Kind, J>(&tile.v[d], tile.padded, scores, rows, shrink, panel.sum + d * J * LANES);
}

// Load `panel.count` queries of a K/V head, starting at query `begin`.
template <class Kind, class T>
TARGET void begin_panel(const PrefixAttention &job, Panel &panel, int64_t kv_head, int64_t begin, int64_t padded) {
    const int64_t dim = job.head_dim, lanes = panel.lanes();
    panel.q = linear::aligned(panel.room, (dim + padded) * lanes);
    panel.sum = panel.q + dim * lanes;
    std::fill_n(panel.q, (dim + padded) * lanes, 0.0f);
    std::fill_n(panel.maximum, WIDE * LANES, -INFINITY);
    std::fill_n(panel.total, WIDE * LANES, 0.0f);
    std::fill_n(panel.slopes, WIDE * LANES, 0.0f);
    std::fill_n(panel.positions, WIDE * LANES, 0.0f);
    std::fill_n(panel.first, WIDE * LANES, 0);
    std::fill_n(panel.end, WIDE * LANES, (int32_t)job.tokens);
    panel.earliest = panel.earliest_end = (int32_t)job.tokens;
    panel.latest = panel.latest_end = 0;
    std::vector<float> words(dim + 1);
    for (int64_t m = 0; m < panel.count; ++m) {
        const int64_t query = begin + m, place = job.place(kv_head, query);
        Kind::keys((const T *)job.q + place * dim, dim, words.data());
        for (int64_t i = 0; i * Kind::NUMBERS < dim; ++i) memcpy(panel.q + i * lanes + m, &words[i], sizeof(float));
        const int64_t row = query / (job.group() * job.fresh), token = query % job.fresh;
        if (job.slopes) {
            panel.slopes[m] = job.slopes[job.head(kv_head, query)];
            panel.positions[m] = (float)(job.positions[row] + token);
        }
        if (job.first) panel.first[m] = (int32_t)job.first[row * job.fresh + token];
        panel.earliest = std::min(panel.earliest, panel.first[m]);
        panel.latest = std::max(panel.latest, panel.first[m]);
        panel.end[m] = (int32_t)job.end(query);
        panel.earliest_end = std::min(panel.earliest_end, panel.end[m]);
        panel.latest_end = std::max(panel.latest_end, panel.end[m]);
    }
}

// The largest score of a query and the sum of exponentials relative to it.
struct Softmax {
    float maximum, total;

    // Add a score without a value.
    void add(float sink) {
        const float most = std::max(maximum, sink);
        if (most == -INFINITY) return;
        total = total * std::exp(maximum - most) + std::exp(sink - most);
        maximum = most;
    }
    float lse() const { return total == 0.0f ? -INFINITY : maximum + std::log(total); }
};

template <class T>
TARGET void write_prompt(const PrefixAttention &job, const Panel &panel, int64_t kv_head, int64_t begin) {
    const int64_t dim = job.head_dim, lanes = panel.lanes();
    std::vector<float> values(dim);
    for (int64_t m = 0; m < panel.count; ++m) {
        const int64_t query = begin + m, head = job.head(kv_head, query);
        Softmax softmax{panel.maximum[m], panel.total[m]};
        if (job.sinks) softmax.add(job.sinks[head]);
        const float factor = softmax.total == 0.0f ? 0.0f : std::exp(panel.maximum[m] - softmax.maximum) / softmax.total;
        for (int64_t d = 0; d < dim; ++d) values[d] = panel.sum[d * lanes + m] * factor;
        elementwise::narrow(values.data(), (T *)job.prompt_out + job.place(kv_head, query) * dim, dim);
        if (job.lse) job.lse[head * job.fresh + query % job.fresh] = softmax.lse();
    }
}

TARGET inline void write_panel(const PrefixAttention &job, const Panel &panel, int64_t kv_head, int64_t begin,
                               int64_t split) {
    const int64_t dim = job.head_dim, lanes = panel.lanes();
    for (int64_t m = 0; m < panel.count; ++m) {
        const int64_t place = job.place(kv_head, begin + m);
        const Softmax softmax{panel.maximum[m], panel.total[m]};
        const float factor = softmax.total == 0.0f ? 0.0f : 1.0f / softmax.total;
        float *out = job.values(split) + place * dim;
        for (int64_t d = 0; d < dim; ++d) out[d] = panel.sum[d * lanes + m] * factor;
        job.sums(split)[place] = softmax.lse();
    }
}

template <class Kind, class T>
TARGET void attend(PrefixAttention &job) {
    constexpr int64_t MOST = WIDE * LANES;
    const int64_t dim = job.head_dim;
    Tile tile(dim);
    std::vector<float> room;
    float *const scores = linear::aligned(room, TOKENS * MOST);
    std::vector<Panel> panels;
    for (int64_t task; (task = job.claimed.fetch_add(1, std::memory_order_relaxed)) < job.tasks();) {
        const int64_t split = task % job.splits, block = task / job.splits % job.blocks();
        const int64_t kv_head = task / job.splits / job.blocks(), begin = block * job.task_queries;
        const int64_t end = std::min(begin + job.task_queries, job.queries());
        panels.resize((end - begin + MOST - 1) / MOST);
        int64_t token = job.tokens, last = 0;
        for (size_t n = 0; n < panels.size(); ++n) {
            const int64_t from = begin + (int64_t)n * MOST;
            panels[n].count = std::min(MOST, end - from);
            panels[n].vectors = panels[n].count > LANES ? 2 : 1;
            begin_panel<Kind, T>(job, panels[n], kv_head, from, tile.padded);
            token = std::min<int64_t>(token, panels[n].earliest);
            last = std::max<int64_t>(last, panels[n].latest_end);
        }
        last = std::min((split + 1) * job.split_tokens, last);
        for (token = std::max(token, split * job.split_tokens); token < last; token += TOKENS) {
            tile.begin = token;
            tile.tokens = std::min(TOKENS, last - token);
            const int64_t at = kv_head * job.head_stride + token * job.token_stride;
            for (int64_t t = 0; t < tile.tokens; ++t)
                Kind::keys((const T *)job.k + at + t * job.token_stride, dim, &tile.k[t * tile.padded]);
            Kind::values((const T *)job.v + at, job.token_stride, tile.tokens, dim, tile.padded, tile.v.data());
            for (Panel &panel : panels) {
                if (panel.earliest >= token + tile.tokens || panel.latest_end <= token) continue;
                panel.vectors == 1 ? attend_tile<Kind, 1>(job, panel, tile, scores)
                                   : attend_tile<Kind, 2>(job, panel, tile, scores);
            }
        }
        for (size_t n = 0; n < panels.size(); ++n) {
            const int64_t from = begin + (int64_t)n * MOST;
            if (job.causal) write_prompt<T>(job, panels[n], kv_head, from);
            else write_panel(job, panels[n], kv_head, from, split);
        }
    }
}

void attend_any(PrefixAttention &job) {
    if (job.type == Type::float32) return attend<Widened, float>(job);
#ifdef FLEXGEN_DOT_BF16
    if (job.type == Type::bfloat16) return attend<Paired, Bf16>(job);
#endif
    if (job.type == Type::bfloat16) return attend<Widened, Bf16>(job);
    attend<Widened, Half>(job);
}

}  // namespace prefix
}  // namespace VARIANT
