// Rotary positions of single tokens, for one variant. Products are rounded to T before they are added, like those of
// tensors of that type.

namespace VARIANT {
namespace rotation {

template <class T>
INLINE void turn(Vec &a, Vec &b, Vec cos, Vec minus_sin, Vec sin) {
    const Vec first = rounded<T>(a * cos) + rounded<T>(b * minus_sin);
    b = rounded<T>(b * cos) + rounded<T>(a * sin);
    a = first;
}

template <class T>
TARGET void rotate_rows(const Rotation &job, int64_t begin, int64_t end) {
    const int64_t half = job.half, body = half / LANES * LANES, rest = half - body;
    for (int64_t row = begin; row < end; ++row) {
        const T *cos = (const T *)job.factors + row * 4 * half, *minus_sin = cos + 2 * half, *sin = cos + 3 * half;
        for (int64_t head = 0; head < job.heads; ++head) {
            T *a = (T *)job.x + row * job.stride + head * job.head_dim, *b = a + half;
            for (int64_t i = 0; i < body; i += LANES) {
                Vec first = load(a + i), second = load(b + i);
                turn<T>(first, second, load(cos + i), load(minus_sin + i), load(sin + i));
                store(a + i, first);
                store(b + i, second);
            }
            if (!rest) continue;
            Vec first = load_part(a + body, rest), second = load_part(b + body, rest);
            turn<T>(first, second, load_part(cos + body, rest), load_part(minus_sin + body, rest),
                    load_part(sin + body, rest));
            store_part(a + body, first, rest);
            store_part(b + body, second, rest);
        }
    }
}

void rotate_any(const Rotation &job, int64_t begin, int64_t end) {
    if (job.type == Type::bfloat16) return rotate_rows<Bf16>(job, begin, end);
    rotate_rows<Half>(job, begin, end);
}

}  // namespace rotation
}  // namespace VARIANT
