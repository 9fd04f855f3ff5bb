// Attention over keys and values that all rows share, for one variant.
//
// Each number of K and V is used for many queries, so the time is that of the arithmetic, not of the memory. A task is a
// K/V head and a block of queries: those of several rows, of all query heads that share the K/V head. They are in the
// lanes of vectors, and keys and values are broadcast to all lanes. So the products need no sums over lanes, the softmax
// needs no shuffles, and K and V are used in their own order. The queries of a task are divided into panels of one or
// two vectors. TOKENS tokens are widened to float32 once, and used by all panels while they are in the cache.

namespace VARIANT {
namespace prefix {

constexpr int WIDE = 2;  // vectors of a panel, at most
constexpr int64_t TOKENS = 64;  // a multiple of SUM_REGISTERS

// Queries whose sums are in registers together. Arrays by lane are padded with values of queries that are not written.
struct Panel {
    int64_t count;  // of queries
    int vectors;  // 1 or 2
    float *q, *sum;  // queries times the scale (head_dim, lanes), and sums of values (padded head_dim, lanes)
    std::vector<float> room;  // for both
    float maximum[WIDE * LANES], total[WIDE * LANES];
    float slopes[WIDE * LANES], positions[WIDE * LANES];
    int32_t first[WIDE * LANES];  // the first token that a query attends to
    int32_t earliest, latest;  // of `first`

    int lanes() const { return vectors * LANES; }
};

// A block of tokens in float32, (TOKENS, padded head_dim) each.
struct Tile {
    std::vector<float> k, v;
    int64_t begin, tokens, dim, padded;  // padded with zeros to a multiple of SUM_REGISTERS

    explicit Tile(int64_t head_dim) : dim(head_dim) {
        padded = (dim + SUM_REGISTERS - 1) / SUM_REGISTERS * SUM_REGISTERS;
        k.resize(TOKENS * padded);
        v.resize(TOKENS * padded);
    }
};

// The scores of SUM_REGISTERS / J tokens with a panel of J vectors.
template <int J>
APART void score(const float *k, int64_t stride, const float *q, int64_t dim, float *scores) {
    constexpr int KEYS = SUM_REGISTERS / J;
    Vec sum[KEYS][J];
    UNROLLED for (int i = 0; i < KEYS; ++i)
        UNROLLED for (int j = 0; j < J; ++j) sum[i][j] = Vec{};
    for (const float *const end = k + dim; k < end; ++k, q += J * LANES) {
        Vec queries[J];
        UNROLLED for (int j = 0; j < J; ++j) queries[j] = load(q + j * LANES);
        UNROLLED for (int i = 0; i < KEYS; ++i) {
            const Vec key = splat(k[i * stride]);
            UNROLLED for (int j = 0; j < J; ++j) sum[i][j] = fma(key, queries[j], sum[i][j]);
        }
    }
    UNROLLED for (int i = 0; i < KEYS; ++i)
        UNROLLED for (int j = 0; j < J; ++j) store(scores + (i * J + j) * LANES, sum[i][j]);
}

// Add SUM_REGISTERS / J columns of the values, weighted by the exponentials of the scores, to `sums` times `shrink`.
template <int J>
APART void add(const float *v, int64_t stride, const float *weights, int64_t tokens, const float *shrink, float *sums) {
    constexpr int COLUMNS = SUM_REGISTERS / J;
    Vec sum[COLUMNS][J];
    UNROLLED for (int i = 0; i < COLUMNS; ++i)
        UNROLLED for (int j = 0; j < J; ++j)
            sum[i][j] = load(sums + (i * J + j) * LANES) * load(shrink + j * LANES);
    for (const float *const end = weights + tokens * J * LANES; weights < end; weights += J * LANES, v += stride) {
        Vec weight[J];
        UNROLLED for (int j = 0; j < J; ++j) weight[j] = load(weights + j * LANES);
        UNROLLED for (int i = 0; i < COLUMNS; ++i) {
            const Vec value = splat(v[i]);
            UNROLLED for (int j = 0; j < J; ++j) sum[i][j] = fma(value, weight[j], sum[i][j]);
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
        const Ints first = raw<Ints>(panel.first + j * LANES);
        for (int64_t t = 0; t < tile.tokens; ++t) {
            float *at = scores + (t * J + j) * LANES;
            store(at, first <= (int32_t)(tile.begin + t) ? load(at) : hidden);
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

template <int J>
TARGET void attend_tile(const PrefixAttention &job, Panel &panel, const Tile &tile, float *scores) {
    constexpr int AT_ONCE = SUM_REGISTERS / J;
    float shrink[WIDE * LANES];
    for (int64_t t = 0; t < tile.tokens; t += AT_ONCE)
        score<J>(&tile.k[t * tile.padded], tile.padded, panel.q, tile.dim, scores + t * J * LANES);
    if (job.cap != 0.0f || job.slopes) adjust<J>(job, panel, tile, scores);
    if (panel.latest > tile.begin) hide<J>(panel, tile, scores);
    exponentials<J>(panel, tile.tokens, scores, shrink);
    for (int64_t d = 0; d < tile.dim; d += AT_ONCE)
        add<J>(&tile.v[d], tile.padded, scores, tile.tokens, shrink, panel.sum + d * J * LANES);
}

// Load `panel.count` queries of a K/V head, starting at query `begin`.
template <class T>
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
    panel.earliest = (int32_t)job.tokens;
    panel.latest = 0;
    std::vector<float> wide(dim);
    for (int64_t m = 0; m < panel.count; ++m) {
        const int64_t query = begin + m, place = job.place(kv_head, query);
        linear::widen((const T *)job.q + place * dim, wide.data(), dim);
        for (int64_t d = 0; d < dim; ++d) panel.q[d * lanes + m] = wide[d] * job.scale;
        const int64_t row = query / (job.group() * job.fresh), token = query % job.fresh;
        if (job.slopes) {
            panel.slopes[m] = job.slopes[place / job.fresh % job.heads];
            panel.positions[m] = (float)(job.positions[row] + token);
        }
        if (job.first) panel.first[m] = (int32_t)job.first[row * job.fresh + token];
        panel.earliest = std::min(panel.earliest, panel.first[m]);
        panel.latest = std::max(panel.latest, panel.first[m]);
    }
}

TARGET inline void write_panel(const PrefixAttention &job, const Panel &panel, int64_t kv_head, int64_t begin,
                               int64_t split) {
    const int64_t dim = job.head_dim, lanes = panel.lanes();
    for (int64_t m = 0; m < panel.count; ++m) {
        const int64_t place = job.place(kv_head, begin + m);
        const float total = panel.total[m], factor = total == 0.0f ? 0.0f : 1.0f / total;
        float *out = job.values(split) + place * dim;
        for (int64_t d = 0; d < dim; ++d) out[d] = panel.sum[d * lanes + m] * factor;
        job.sums(split)[place] = total == 0.0f ? -INFINITY : panel.maximum[m] + std::log(total);
    }
}

template <class T>
TARGET void attend(PrefixAttention &job) {
    constexpr int64_t MOST = WIDE * LANES;
    const int64_t dim = job.head_dim, stride = job.head_stride;
    Tile tile(dim);
    std::vector<float> room;
    float *const scores = linear::aligned(room, TOKENS * MOST);
    std::vector<Panel> panels;
    for (int64_t task; (task = job.claimed.fetch_add(1, std::memory_order_relaxed)) < job.tasks();) {
        const int64_t split = task % job.splits, block = task / job.splits % job.blocks();
        const int64_t kv_head = task / job.splits / job.blocks(), begin = block * PrefixAttention::QUERIES;
        const int64_t end = std::min(begin + PrefixAttention::QUERIES, job.queries());
        panels.resize((end - begin + MOST - 1) / MOST);
        int64_t token = job.tokens;
        for (size_t n = 0; n < panels.size(); ++n) {
            const int64_t from = begin + (int64_t)n * MOST;
            panels[n].count = std::min(MOST, end - from);
            panels[n].vectors = panels[n].count > LANES ? 2 : 1;
            begin_panel<T>(job, panels[n], kv_head, from, tile.padded);
            token = std::min<int64_t>(token, panels[n].earliest);
        }
        const int64_t last = std::min((split + 1) * job.split_tokens, job.tokens);
        for (token = std::max(token, split * job.split_tokens); token < last; token += TOKENS) {
            tile.begin = token;
            tile.tokens = std::min(TOKENS, last - token);
            for (int64_t t = 0; t < tile.tokens; ++t) {
                const int64_t at = kv_head * stride + (token + t) * dim;
                linear::widen((const T *)job.k + at, &tile.k[t * tile.padded], dim);
                linear::widen((const T *)job.v + at, &tile.v[t * tile.padded], dim);
            }
            for (Panel &panel : panels) {
                if (panel.earliest >= token + tile.tokens) continue;
                panel.vectors == 1 ? attend_tile<1>(job, panel, tile, scores)
                                   : attend_tile<2>(job, panel, tile, scores);
            }
        }
        for (size_t n = 0; n < panels.size(); ++n)
            write_panel(job, panels[n], kv_head, begin + (int64_t)n * MOST, split);
    }
}

void attend_any(PrefixAttention &job) {
    if (job.type == Type::float32) return attend<float>(job);
    if (job.type == Type::bfloat16) return attend<Bf16>(job);
    attend<Half>(job);
}

}  // namespace prefix
}  // namespace VARIANT
