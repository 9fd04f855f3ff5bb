// Products of group-wise integers with x in bfloat16, or in int8 after rounding, by dot products of short operands.
#pragma once

#include "codes.h"

namespace VARIANT {
namespace dots {

template <class T>
INLINE void write_vector(const PackedLinear &job, Vec totals, int64_t m, int64_t n, int64_t count) {
    if (job.bias) totals += count == LANES ? load((const T *)job.bias + n) : load_part((const T *)job.bias + n, count);
    T *to = (T *)job.y + m * job.out + n;
    count == LANES ? store(to, totals) : store_part(to, totals, count);
}

// Write the products of row `m` of x with `count` rows of W from `n`.
INLINE void write_outputs(const PackedLinear &job, Vec totals, int64_t m, int64_t n, int64_t count) {
    if (job.type == Type::float32) return write_vector<float>(job, totals, m, n, count);
    if (job.type == Type::bfloat16) return write_vector<Bf16>(job, totals, m, n, count);
    write_vector<Half>(job, totals, m, n, count);
}

// Transpose 16 rows of floats with distance `stride` to `count` <= 16 rows of 16 floats with distance `width`.
TARGET inline void transpose(const float *from, int64_t stride, float *to, int64_t width, int64_t count) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int k = 0; k < 2; ++k) {
            const __m512d low = (__m512d)b[i + k], high = (__m512d)b[i + 2 + k];
            a[i + 2 * k] = (__m512)_mm512_unpacklo_pd(low, high);
            a[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    }
    // a[4 * r + c] has, in each of its four parts p, column 4 * p + c of the rows from 4 * r.
    for (int c = 0; c < 4; ++c) {
        const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
        const __m512 even_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        b[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        b[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        b[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        b[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
    for (int64_t i = 0; i < count; ++i) store(to + i * width, b[i]);
}

}  // namespace dots
}  // namespace VARIANT

#include "few_rows.h"
#include "strips.h"

namespace VARIANT {
namespace dots {

// Whether W can be multiplied here: groups are whole chunks, and a scale of rounded x belongs to one group.
inline bool fits(const PackedLinear &job) {
    if (job.bits == 16 || job.group % VALUES) return false;
    return job.rounded ? job.group == VALUES : job.type == Type::bfloat16;
}

template <class Kind, int BITS>
TARGET void prepare_bits(PackedLinear &job) {
    if (job.rows <= MOST_FEW) return prepare_few<Kind, BITS>(job);
    job.block = 2 * STRIP;
    job.tiled = true;
    prepare_strips<Kind, BITS>(job);
}
template <class Kind, int BITS>
TARGET void multiply_bits(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.rows <= MOST_FEW) return multiply_few<Kind, BITS>(job, begin, end);
    fused(job) ? multiply_strips<Kind, BITS, 1>(job, begin, end) : multiply_strips<Kind, BITS, 2>(job, begin, end);
}

TARGET inline void prepare(PackedLinear &job) {
    job.block = STRIP;
    if (job.rounded) return job.bits == 4 ? prepare_bits<Bytes, 4>(job) : prepare_bits<Bytes, 8>(job);
    job.bits == 4 ? prepare_bits<Pairs, 4>(job) : prepare_bits<Pairs, 8>(job);
}
TARGET inline void order(const PackedLinear &job, int64_t first, int64_t last) {
    if (job.rounded)
        return job.bits == 4 ? order_strips<Bytes, 4>(job, first, last) : order_strips<Bytes, 8>(job, first, last);
    job.bits == 4 ? order_strips<Pairs, 4>(job, first, last) : order_strips<Pairs, 8>(job, first, last);
}
TARGET inline void multiply(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.rounded)
        return job.bits == 4 ? multiply_bits<Bytes, 4>(job, begin, end) : multiply_bits<Bytes, 8>(job, begin, end);
    job.bits == 4 ? multiply_bits<Pairs, 4>(job, begin, end) : multiply_bits<Pairs, 8>(job, begin, end);
}

}  // namespace dots
}  // namespace VARIANT
