// Sparse decode attention for one variant, in two halves. `choose` scores all keys and chooses tokens for each row and
// K/V head; `attend_chosen` reads only the values of these tokens.
//
// Tokens that reach a threshold are chosen in memory order, so that values are read at ascending addresses.
namespace VARIANT {
namespace sparse {

using attention::Heads;
using attention::MAX_HEADS;
using attention::Pass;

constexpr int64_t CHUNK_TOKENS = 64;  // keys that all query heads process while they are in the cache
constexpr int64_t TOKENS_AHEAD = 8;  // values are scattered: the processor does not prefetch the next ones

template <class T>
TARGET void score(const T *k, Heads &heads, const Pass &pass) {
    if (heads.count == 1)
        attention::score<T, 1>(k, heads, pass);
    else if (heads.count == 2)
        attention::score<T, 2>(k, heads, pass);
    else if (heads.count <= 4)
        attention::score<T, 4>(k, heads, pass);
    else
        attention::score<T, MAX_HEADS>(k, heads, pass);
}

// Convert scores to probabilities, and add those of the `count` real heads to `weights`, one for each token.
template <int HEADS>
TARGET void weigh(Heads &heads, const Pass &pass, float *weights) {
    float shrink[LANES], lanes[LANES];
    attention::exponentials<HEADS>(heads, pass, shrink);
    for (int i = 0; i < LANES; ++i) lanes[i] = i % HEADS < heads.count ? 1.0f / heads.total_of(i % HEADS) : 0.0f;
    const Vec factors = raw<Vec>(lanes);
    for (int64_t i = 0; i < pass.tokens * HEADS; i += LANES)
        store(pass.scores + i, raw<Vec>(pass.scores + i) * factors);
    for (int64_t t = 0; t < pass.tokens; ++t)
        for (int h = 0; h < HEADS; ++h) weights[t] += pass.scores[t * HEADS + h];
}

TARGET inline void weigh_any(Heads &heads, const Pass &pass, float *weights) {
    if (heads.count == 1)
        weigh<1>(heads, pass, weights);
    else if (heads.count == 2)
        weigh<2>(heads, pass, weights);
    else if (heads.count <= 4)
        weigh<4>(heads, pass, weights);
    else
        weigh<MAX_HEADS>(heads, pass, weights);
}

// The largest threshold that at least `keep` of `values` reach. Values are >= 0, with zeros up to a multiple of LANES.
// It is found bit by bit: floats >= 0 have the order of their bits, and counting needs no branches.
TARGET inline float threshold(const std::vector<float> &values, int64_t keep) {
    int32_t found = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const int32_t candidate = found | 1 << bit;
        Ints reached = {};
        for (size_t i = 0; i < values.size(); i += LANES) reached -= raw<Ints>(&values[i]) >= candidate;
        int64_t count = 0;
        for (int i = 0; i < LANES; ++i) count += reached[i];
        if (count >= keep) found = candidate;
    }
    float value;
    memcpy(&value, &found, sizeof value);
    return value;
}

// The probabilities of all query heads of one row and K/V head, starting at token `begin`.
template <class T>
struct Item {
    std::vector<Heads> sets;
    std::vector<std::vector<float>> scores;  // for each set (tokens, width); replaced by probabilities
    std::vector<float> weights;  // for each token: the sum of the probabilities of the query heads
    std::vector<float> blocks;

    Item(const Choice &job, int64_t padded) : sets((job.group() + MAX_HEADS - 1) / MAX_HEADS) {
        for (size_t n = 0; n < sets.size(); ++n) {
            sets[n].count = (int)std::min<int64_t>(MAX_HEADS, job.group() - (int64_t)n * MAX_HEADS);
            sets[n].q.resize(MAX_HEADS * padded);
            sets[n].sum.resize(MAX_HEADS * padded);
            sets[n].q_bf16.resize(MAX_HEADS * padded);
            scores.emplace_back(job.length * sets[n].width() + 2 * LANES);
        }
        weights.resize(job.length);
    }

    TARGET void attend_to_keys(const Choice &job, int64_t item, int64_t begin, Pass pass) {
        const int64_t length = job.end(item), dim = job.head_dim, token_bytes = dim * (int64_t)sizeof(T);
        for (size_t n = 0; n < sets.size(); ++n) {
            const int64_t head = item * job.group() + (int64_t)n * MAX_HEADS;
            attention::begin_task<T>(sets[n], [&](int h) { return (const T *)job.q + (head + h) * dim; }, pass);
        }
        for (const Page &page : job.pages) {
            const int64_t end = std::min(page.begin + page.tokens, length);
            const char *keys = (const char *)page.k + item * page.tokens * token_bytes;
            for (int64_t token = std::max(begin, page.begin); token < end; token += CHUNK_TOKENS) {
                const char *k = keys + (token - page.begin) * token_bytes;
                pass.tokens = std::min(CHUNK_TOKENS, end - token);
                for (size_t n = 0; n < sets.size(); ++n) {
                    pass.scores = &scores[n][(token - begin) * sets[n].width()];
                    pass.ahead = n ? nullptr : k + CHUNK_TOKENS * token_bytes;
                    score((const T *)k, sets[n], pass);
                }
            }
        }
        pass.tokens = length - begin;
        std::fill_n(weights.begin(), pass.tokens, 0.0f);
        for (size_t n = 0; n < sets.size(); ++n) {
            const int64_t heads = sets[n].width();
            pass.scores = scores[n].data();
            for (int64_t i = pass.tokens * heads; i % LANES; ++i) pass.scores[i] = -INFINITY;
            weigh_any(sets[n], pass, weights.data());
        }
    }

    // Write the chosen ones of the tokens from `begin` to `cached`, the position of the new one, in ascending order, and
    // return their number.
    TARGET int64_t pick(const Choice &job, int64_t begin, int64_t cached, int64_t *positions) {
        if (begin >= cached) return 0;
        const int64_t first = begin / job.unit, count = (cached - 1) / job.unit - first + 1;
        blocks.assign((count + LANES - 1) / LANES * LANES, 0.0f);
        if (job.unit == 1) {
            for (int64_t n = 0; n < count; ++n) blocks[n] = weights[n] > 0 ? weights[n] : 0;  // NaN has no order
        } else {
            for (int64_t t = begin; t < cached; ++t)
                if (weights[t - begin] > 0) blocks[t / job.unit - first] += weights[t - begin];
        }
        const int64_t keep = chosen_blocks(job.share, count);
        const float least = threshold(blocks, keep);
        int64_t ties = keep, picked = 0;
        for (int64_t n = 0; n < count; ++n) ties -= blocks[n] > least;
        for (int64_t n = 0; n < count; ++n) {
            const bool take = blocks[n] > least || (blocks[n] == least && ties-- > 0);
            if (job.unit == 1) {
                positions[picked] = begin + n;
                picked += take;
                continue;
            }
            if (!take) continue;
            const int64_t from = std::max(begin, (first + n) * job.unit);
            const int64_t to = std::min(cached, (first + n + 1) * job.unit);
            for (int64_t t = from; t < to; ++t) positions[picked++] = t;
        }
        return picked;
    }

    TARGET void write(const Choice &job, int64_t item, int64_t begin) {
        int64_t *positions = job.positions + item * job.most;
        const int64_t cached = job.end(item) - 1;
        const int64_t picked = begin <= cached ? pick(job, begin, cached, positions) : -1;
        // The new token follows. It also fills the unused places of a row with padding.
        std::fill(positions + std::max<int64_t>(picked, 0), positions + job.most, cached);
        for (int64_t h = 0; h < job.group(); ++h) {
            float *weights = job.weights + (item * job.group() + h) * job.most;
            const Heads &set = sets[h / MAX_HEADS];
            const int64_t within = h % MAX_HEADS, heads = set.width();
            const float *of = scores[h / MAX_HEADS].data();
            for (int64_t n = 0; n <= picked; ++n) weights[n] = of[(positions[n] - begin) * heads + within];
            std::fill(weights + picked + 1, weights + job.most, 0.0f);
        }
    }
};

INLINE Pass pass_of(int64_t dim, float scale) {
    Pass pass = {};
    pass.dim = dim;
    pass.padded = (dim + attention::QUERY_PADDING - 1) / attention::QUERY_PADDING * attention::QUERY_PADDING;
    pass.scale = scale;
    return pass;
}

template <class T>
TARGET void choose(Choice &job) {
    const Pass pass = pass_of(job.head_dim, job.scale);
    Item<T> item(job, pass.padded);
    for (int64_t n; (n = job.claimed.fetch_add(1, std::memory_order_relaxed)) < job.items();) {
        const int64_t begin = job.start(n);
        if (begin < job.end(n)) item.attend_to_keys(job, n, begin, pass);
        item.write(job, n, begin);
    }
}

// Compute WIDE vectors of the result for `count` <= HEADS query heads, starting at element `at`. PART: the last vector
// is partial.
template <class T, int HEADS, int WIDE, bool PART>
INLINE void add_columns(const Chosen &job, const T *const *from, const float *weights, int count, T *out,
                        int64_t at) {
    Vec sum[HEADS][WIDE] = {};
    for (int64_t t = 0; t < job.most; ++t) {
        if (at == 0 && t + TOKENS_AHEAD < job.most) {
            const char *ahead = (const char *)from[t + TOKENS_AHEAD];
            attention::prefetch(ahead, 0, job.head_dim * (int64_t)sizeof(T));
        }
        for (int w = 0; w < WIDE; ++w) {
            const T *v = from[t] + at + w * LANES;
            const Vec value = PART ? load_part(v, job.head_dim - at) : load(v);
            for (int h = 0; h < HEADS; ++h) {
                const int64_t head = h < count ? h : 0;  // unused if there are fewer heads
                sum[h][w] = fma(value, splat(weights[head * job.most + t]), sum[h][w]);
            }
        }
    }
    for (int h = 0; h < count; ++h)
        for (int w = 0; w < WIDE; ++w) {
            T *to = out + h * job.head_dim + at + w * LANES;
            if (PART)
                store_part(to, sum[h][w], job.head_dim - at);
            else
                store(to, sum[h][w]);
        }
}

template <class T, int HEADS, int WIDE>
TARGET inline void add_values(const Chosen &job, const T *const *from, const float *weights, int count, T *out,
                              int64_t at) {
    for (; at + WIDE * LANES <= job.head_dim; at += WIDE * LANES)
        add_columns<T, HEADS, WIDE, false>(job, from, weights, count, out, at);
    if constexpr (WIDE > 1)
        add_values<T, HEADS, WIDE / 2>(job, from, weights, count, out, at);
    else if (at < job.head_dim)
        add_columns<T, HEADS, 1, true>(job, from, weights, count, out, at);
}

template <class T>
TARGET void attend_chosen(Chosen &job) {
    std::vector<const T *> from(job.most);
    for (int64_t item; (item = job.claimed.fetch_add(1, std::memory_order_relaxed)) < job.items();) {
        const int64_t *positions = job.positions + item * job.most;
        size_t n = 0;
        for (int64_t t = 0; t < job.most; ++t) {
            if (positions[t] < job.pages[n].begin) n = 0;
            while (job.pages[n].begin + job.pages[n].tokens <= positions[t]) ++n;
            const Page &page = job.pages[n];
            from[t] = (const T *)page.v + (item * page.tokens + positions[t] - page.begin) * job.head_dim;
        }
        for (int64_t h = 0; h < job.group(); h += MAX_HEADS) {
            const int count = (int)std::min<int64_t>(MAX_HEADS, job.group() - h);
            const int64_t head = item * job.group() + h;
            const float *weights = job.weights + head * job.most;
            T *out = (T *)job.out + head * job.head_dim;
            if (count == 1)
                add_values<T, 1, SUM_REGISTERS>(job, from.data(), weights, count, out, 0);
            else if (count == 2)
                add_values<T, 2, SUM_REGISTERS / 2>(job, from.data(), weights, count, out, 0);
            else if (count <= 4)
                add_values<T, 4, SUM_REGISTERS / 4>(job, from.data(), weights, count, out, 0);
            else
                add_values<T, MAX_HEADS, SUM_REGISTERS / MAX_HEADS>(job, from.data(), weights, count, out, 0);
        }
    }
}

void choose_any(Choice &job) {
    if (job.type == Type::float32) return choose<float>(job);
    if (job.type == Type::bfloat16) return choose<Bf16>(job);
    choose<Half>(job);
}

void attend_chosen_any(Chosen &job) {
    if (job.type == Type::float32) return attend_chosen<float>(job);
    if (job.type == Type::bfloat16) return attend_chosen<Bf16>(job);
    attend_chosen<Half>(job);
}

}  // namespace sparse
}  // namespace VARIANT
