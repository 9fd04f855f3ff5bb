// RMS norms, for one variant. A row is read twice; the second time, it is in the L1 cache.

namespace VARIANT {
namespace norms {

template <class T>
INLINE Vec scaled(const RmsNorm &job, Vec x, Vec weight) {
    const Vec factor = weight + splat(job.plus);
    if (job.round_first) return rounded<T>(x) * rounded<T>(factor);
    return x * factor;
}

template <class T>
TARGET void normalise_rows(const RmsNorm &job, int64_t begin, int64_t end) {
    const auto *weight = (const T *)job.weight;
    const int64_t body = job.size / LANES * LANES, rest = job.size - body;
    for (int64_t row = begin; row < end; ++row) {
        const T *x = (const T *)job.x + row * job.size;
        T *y = (T *)job.y + row * job.size;
        Vec squares[4] = {};
        int64_t i = 0;
        for (; i + 4 * LANES <= body; i += 4 * LANES) {
            for (int k = 0; k < 4; ++k) {
                const Vec values = load(x + i + k * LANES);
                squares[k] = fma(values, values, squares[k]);
            }
        }
        for (; i < body; i += LANES) squares[0] = fma(load(x + i), load(x + i), squares[0]);
        if (rest) squares[1] = fma(load_part(x + body, rest), load_part(x + body, rest), squares[1]);
        float lanes[LANES], sum = 0.0f;
        store(lanes, (squares[0] + squares[1]) + (squares[2] + squares[3]));
        for (float each : lanes) sum += each;
        const Vec factor = splat(1.0f / std::sqrt(sum / (float)job.size + job.eps));
        for (i = 0; i < body; i += LANES) {
            const Vec normed = load(x + i) * factor;
            store(y + i, weight ? scaled<T>(job, normed, load(weight + i)) : normed);
        }
        if (rest) {
            const Vec normed = load_part(x + body, rest) * factor;
            store_part(y + body, weight ? scaled<T>(job, normed, load_part(weight + body, rest)) : normed, rest);
        }
    }
}

void normalise_any(const RmsNorm &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return normalise_rows<float>(job, begin, end);
    if (job.type == Type::bfloat16) return normalise_rows<Bf16>(job, begin, end);
    normalise_rows<Half>(job, begin, end);
}

}  // namespace norms
}  // namespace VARIANT
