// Group-wise integers for one variant. With codes of at most 8 bits and a scale of at most 11 bits, q * scale is exact
// in float32, so all variants and torch compute the same x.
#include <algorithm>

namespace VARIANT {
namespace groupwise {

template <class T, class S, int BITS>
TARGET void dequantise(const Groupwise &job, int64_t begin, int64_t end) {
    const int64_t group = job.group, octets = group * BITS / 8;
    for (int64_t g = begin; g < end; ++g) {
        const Vec scale = splat(scalar((const S *)job.scales + g));
        const Vec minimum = splat(scalar((const S *)job.minimums + g));
        const uint8_t *packed = job.packed + g * octets;
        T *x = (T *)job.x + g * group;
        for (int64_t n = 0; n < octets; n += LANES) {
            const int64_t i = std::min(n, octets - LANES);  // the last vector ends at the end of the group
            const Words q = load_octets(packed + i);
            if (BITS == 8) {
                store(x + i, fma(to_float(q), scale, minimum));
            } else {
                store(x + i, fma(to_float(q & 15), scale, minimum));
                store(x + octets + i, fma(to_float(q >> 4), scale, minimum));
            }
        }
    }
}

INLINE float largest(Bf16) { return 3.3895314e38f; }
INLINE float largest(Half) { return 65504.0f; }

template <class S>
INLINE float rounded(float x, S *to) {
    const float limit = largest(S());
    store_part(to, splat(std::min(std::max(x, -limit), limit)), 1);
    return scalar(to);
}

// The step of a group. Below the normal numbers of float16 it is rounded up to a multiple of 2^-24, as in torch: see
// quantise in groupwise.py.
INLINE float step_of(float range, int levels, const Bf16 *) { return range * (float)(1.0 / levels); }
INLINE float step_of(float range, int levels, const Half *) {
    const float step = range * (float)(1.0 / levels), unit = 1.0f / (1 << 24);
    if (step >= 1.0f / (1 << 14)) return step;
    return ceilf(range * (float)((1 << 24) * (1 - 1.0 / (1 << 20)) / levels)) * unit;
}

template <class T, class S, int BITS>
TARGET void quantise(const Groupwise &job, int64_t begin, int64_t end) {
    const int64_t group = job.group, octets = group * BITS / 8;
    const int levels = (1 << BITS) - 1;
    for (int64_t g = begin; g < end; ++g) {
        const T *x = (const T *)job.x + g * group;
        Vec low = load(x), high = low;
        for (int64_t n = LANES; n < group; n += LANES) {
            const int64_t i = std::min(n, group - LANES);
            low = smaller(load(x + i), low);
            high = larger(load(x + i), high);
        }
        float lows[LANES], highs[LANES];
        store(lows, low);
        store(highs, high);
        // Compute the codes with the stored scale and minimum, not with their values before rounding.
        const float minimum = rounded(*std::min_element(lows, lows + LANES) + 0.0f, (S *)job.minimums + g);
        const float range = std::max(*std::max_element(highs, highs + LANES) - minimum, 0.0f);
        const float scale = rounded(step_of(range, levels, (const S *)nullptr), (S *)job.scales + g);
        uint8_t *packed = job.packed + g * octets;
        if (scale == 0.0f) {
            memset(packed, 0, octets);
            continue;
        }
        const Vec shift = splat(8388608.0f), last = splat((float)levels);  // 2^23: its last bits count units
        for (int64_t n = 0; n < octets; n += LANES) {
            const int64_t i = std::min(n, octets - LANES);
            Words codes = {};
            for (int part = 0; part < 8 / BITS; ++part) {
                const Vec steps = (load(x + part * octets + i) - minimum) / scale;
                const Vec shifted = smaller(larger(steps, Vec{}), last) + shift;  // ties to even
                codes |= ((Words)shifted & 255) << (part * BITS);
            }
            store_octets(packed + i, codes);
        }
    }
}

template <class T, class S>
void dequantise_bits(const Groupwise &job, int64_t begin, int64_t end) {
    job.bits == 4 ? dequantise<T, S, 4>(job, begin, end) : dequantise<T, S, 8>(job, begin, end);
}
template <class T, class S>
void quantise_bits(const Groupwise &job, int64_t begin, int64_t end) {
    job.bits == 4 ? quantise<T, S, 4>(job, begin, end) : quantise<T, S, 8>(job, begin, end);
}

template <class T>
void dequantise_type(const Groupwise &job, int64_t begin, int64_t end) {
    job.scale_type == Type::bfloat16 ? dequantise_bits<T, Bf16>(job, begin, end)
                                     : dequantise_bits<T, Half>(job, begin, end);
}
template <class T>
void quantise_type(const Groupwise &job, int64_t begin, int64_t end) {
    job.scale_type == Type::bfloat16 ? quantise_bits<T, Bf16>(job, begin, end)
                                     : quantise_bits<T, Half>(job, begin, end);
}

void dequantise_any(const Groupwise &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return dequantise_type<float>(job, begin, end);
    if (job.type == Type::bfloat16) return dequantise_type<Bf16>(job, begin, end);
    dequantise_type<Half>(job, begin, end);
}
void quantise_any(const Groupwise &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return quantise_type<float>(job, begin, end);
    if (job.type == Type::bfloat16) return quantise_type<Bf16>(job, begin, end);
    quantise_type<Half>(job, begin, end);
}

}  // namespace groupwise

// The baseline for the kernels: read every byte once, with the same prefetches.
TARGET uint32_t read(const uint8_t *from, int64_t nbytes) {
    constexpr int64_t WIDTH = sizeof(Words), AHEAD = 8192;
    Words sum[8] = {};
    for (int64_t at = 0; at < nbytes; at += 8 * WIDTH) {
        for (int64_t line = 0; line < 8 * WIDTH; line += 64) __builtin_prefetch(from + at + AHEAD + line);
        for (int n = 0; n < 8; ++n) sum[n] ^= raw<Words>(from + at + n * WIDTH);
    }
    uint32_t all = 0;
    for (const Words &words : sum)
        for (int i = 0; i < LANES; ++i) all ^= words[i];
    return all;
}

}  // namespace VARIANT
