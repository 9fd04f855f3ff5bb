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

void add_any(Type type, void *out, const void *x, int64_t begin, int64_t end) {
    if (type == Type::float32) return add((float *)out + begin, (const float *)x + begin, end - begin);
    if (type == Type::bfloat16) return add((Bf16 *)out + begin, (const Bf16 *)x + begin, end - begin);
    add((Half *)out + begin, (const Half *)x + begin, end - begin);
}

}  // namespace elementwise
}  // namespace VARIANT
