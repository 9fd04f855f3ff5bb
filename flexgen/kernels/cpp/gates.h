// Products with a SiLU gate, for one variant. The gate is rounded to T before the product, like a tensor of that type.

namespace VARIANT {
namespace gates {

// x / (1 + exp(-x))
INLINE Vec silu(Vec x) {
    const Vec small = exponential(x < 0.0f ? x : -x);  // exp(-|x|), which cannot overflow
    return (x < 0.0f ? x * small : x) / (small + 1.0f);
}

template <class T>
TARGET void multiply_rows(const SiluProduct &job, int64_t begin, int64_t end) {
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

void multiply_any(const SiluProduct &job, int64_t begin, int64_t end) {
    if (job.type == Type::bfloat16) return multiply_rows<Bf16>(job, begin, end);
    multiply_rows<Half>(job, begin, end);
}

}  // namespace gates
}  // namespace VARIANT
