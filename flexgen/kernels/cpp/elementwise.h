// Elementwise operations of half types and float32, for one variant.

namespace VARIANT {
namespace elementwise {

// x / (1 + exp(-x))
INLINE Vec silu(Vec x) {
    const Vec small = exponential(x < 0.0f ? x : -x);  // exp(-|x|), which cannot overflow
    return (x < 0.0f ? x * small : x) / (small + 1.0f);
}

// The gate is rounded to T before the product, like a tensor of that type.
template <class T>
TARGET void silu_product(const SiluProduct &job, int64_t begin, int64_t end) {
    const int64_t body = job.size / LANES * LANES, rest = job.size - body;
    for (int64_t row = begin; row < end; ++row) {
        const T *gate = (const T *)job.gate + row * job.stride, *up = (const T *)job.up + row * job.stride;
        T *y = (T *)job.y + row * job.y_stride;
        for (int64_t i = 0; i < body; i += LANES) store(y + i, rounded<T>(silu(load(gate + i))) * load(up + i));
        if (!rest) continue;
        const Vec last = rounded<T>(silu(load_part(gate + body, rest)));
        store_part(y + body, last * load_part(up + body, rest), rest);
    }
}

void silu_product_any(const SiluProduct &job, int64_t begin, int64_t end) {
    if (job.type == Type::bfloat16) return silu_product<Bf16>(job, begin, end);
    silu_product<Half>(job, begin, end);
}

template <class T>
TARGET void add(T *out, const T *x, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, load(out + i) + load(x + i));
    if (i < count) store_part(out + i, load_part(out + i, count - i) + load_part(x + i, count - i), count - i);
}

// Round floats to T.
template <class T>
TARGET void narrow(const float *from, T *to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

// A part weighs as much as the sum of the exponentials of its scores. A query that attends to no token results in zero.
template <class T>
TARGET void merge_parts(const PartsMerge &job, int64_t begin, int64_t end) {
    const int64_t dim = job.head_dim;
    std::vector<float> weights(job.parts.size());
    for (int64_t token = begin; token < end; ++token) {
        const int64_t row = token / job.fresh, n = token % job.fresh;
        for (int64_t head = 0; head < job.heads; ++head) {
            const int64_t place = (row * job.heads + head) * job.fresh + n;
            float largest = -INFINITY, total = 0.0f;
            for (const auto &part : job.parts) largest = std::max(largest, part.lse[place]);
            for (size_t i = 0; i < weights.size(); ++i) {
                const float lse = job.parts[i].lse[place];
                weights[i] = lse == largest ? 1.0f : std::exp(lse - largest);  // 1 also for no token, whose values are 0
                total += weights[i];
            }
            T *out = (T *)job.out + (token * job.heads + head) * dim;
            for (int64_t at = 0; at < dim; at += LANES) {
                const int64_t count = std::min<int64_t>(LANES, dim - at);
                Vec sum = {};
                for (size_t i = 0; i < weights.size(); ++i) {
                    const auto &part = job.parts[i];
                    const float *from = part.values + row * part.row_stride + head * part.head_stride +
                                        n * part.token_stride + at;
                    sum = fma(count < LANES ? load_part(from, count) : load(from), splat(weights[i] / total), sum);
                }
                count < LANES ? store_part(out + at, sum, count) : store(out + at, sum);
            }
        }
    }
}

void merge_parts_any(const PartsMerge &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return merge_parts<float>(job, begin, end);
    if (job.type == Type::bfloat16) return merge_parts<Bf16>(job, begin, end);
    merge_parts<Half>(job, begin, end);
}

void add_any(Type type, void *out, const void *x, int64_t begin, int64_t end) {
    if (type == Type::float32) return add((float *)out + begin, (const float *)x + begin, end - begin);
    if (type == Type::bfloat16) return add((Bf16 *)out + begin, (const Bf16 *)x + begin, end - begin);
    add((Half *)out + begin, (const Half *)x + begin, end - begin);
}

}  // namespace elementwise
}  // namespace VARIANT
