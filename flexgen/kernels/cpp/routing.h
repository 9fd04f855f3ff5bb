// The choices of a router, and the sums of the chosen experts' outputs, for one variant.

namespace VARIANT {
namespace routing {

using linear::padded;
using linear::widen;

// Softmax or sigmoid of `count` values, in place. There is space for whole vectors.
TARGET inline void score(float *x, int64_t count, bool sigmoid) {
    if (sigmoid) {
        for (int64_t i = 0; i < count; i += LANES) {
            const Vec value = load(x + i), small = exponential(value < 0.0f ? value : -value);
            store(x + i, (value < 0.0f ? small : splat(1.0f)) / (small + 1.0f));
        }
        return;
    }
    const float largest = *std::max_element(x, x + count);
    float sum = 0.0f;
    for (int64_t i = 0; i < count; i += LANES) store(x + i, exponential(load(x + i) - largest));
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

// Write the experts that a row chooses, the best first, and their factors (with space for whole vectors).
TARGET inline void choose_row(const Routing &job, int64_t row, float *scores, int64_t *chosen, float *factors) {
    widen(job.type, job.logits, row * job.experts, scores, job.experts);
    if (job.scores_all) score(scores, job.experts, job.sigmoid);
    const auto offered = [&](int64_t i) { return scores[i] + (job.correction ? job.correction[i] : 0.0f); };
    for (int64_t k = 0; k < job.top_k; ++k) {
        int64_t best = -1;
        for (int64_t i = 0; i < job.experts; ++i) {
            if (std::find(chosen, chosen + k, i) != chosen + k) continue;
            if (best < 0 || offered(i) > offered(best)) best = i;
        }
        chosen[k] = best;
        factors[k] = scores[best];
    }
    if (!job.scores_all) score(factors, job.top_k, job.sigmoid);
    float sum = 0.0f;
    for (int64_t k = 0; k < job.top_k; ++k) sum += factors[k];
    const float by = job.normalised ? std::max(sum, job.least_sum) : 1.0f;
    for (int64_t k = 0; k < job.top_k; ++k) factors[k] = factors[k] / by * job.scale;
}

TARGET void route_any(const Routing &job) {
    const int64_t choices = job.rows * job.top_k, width = padded(job.top_k);
    std::vector<float> scores(padded(job.experts)), factors(job.rows * width);
    std::vector<int64_t> chosen(choices);
    std::fill_n(job.ends, job.experts, 0);
    for (int64_t row = 0; row < job.rows; ++row)
        choose_row(job, row, scores.data(), &chosen[row * job.top_k], &factors[row * width]);
    for (int64_t expert : chosen) ++job.ends[expert];
    for (int64_t i = 1; i < job.experts; ++i) job.ends[i] += job.ends[i - 1];
    std::vector<int32_t> next(job.experts);
    for (int64_t i = 1; i < job.experts; ++i) next[i] = job.ends[i - 1];
    for (int64_t n = 0; n < choices; ++n) {
        const int64_t row = n / job.top_k, place = next[chosen[n]]++;
        job.tokens[place] = row;
        job.factors[place] = factors[row * width + n % job.top_k];
        job.places[n] = place;
    }
}

template <class T, class Out>
TARGET void sum_rows(const ExpertSum &job, int64_t begin, int64_t end) {
    const int64_t body = job.size / LANES * LANES, rest = job.size - body;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t *places = job.places + row * job.top_k;
        Out *out = (Out *)job.out + row * job.size;
        for (int64_t i = 0; i < job.size; i += LANES) {
            const int64_t count = i < body ? LANES : rest;
            Vec sum = {};
            for (int64_t k = 0; k < job.top_k; ++k) {
                const T *x = (const T *)job.x + places[k] * job.size + i;
                const Vec values = count == LANES ? load(x) : load_part(x, count);
                sum += values * job.factors[places[k]];
            }
            count == LANES ? store(out + i, sum) : store_part(out + i, sum, count);
        }
    }
}

template <class T>
TARGET void sum_type(const ExpertSum &job, int64_t begin, int64_t end) {
    job.wide ? sum_rows<T, float>(job, begin, end) : sum_rows<T, T>(job, begin, end);
}

void sum_any(const ExpertSum &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return sum_type<float>(job, begin, end);
    if (job.type == Type::bfloat16) return sum_type<Bf16>(job, begin, end);
    sum_type<Half>(job, begin, end);
}

}  // namespace routing
}  // namespace VARIANT
