// Products of group-wise integers by dot products of short operands, with x in bfloat16, or in int8 after rounding.
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

// Transpose 16 rows of floats with distance `stride`: `to[i]` is column i.
INLINE void transpose(const float *from, int64_t stride, Vec (&to)[LANES]) {
    __m512 a[16], b[16];
    UNROLLED
    for (int i = 0; i < 16; ++i) a[i] = load(from + i * stride);
    UNROLLED
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLLED
    for (int i = 0; i < 16; i += 4) {
        UNROLLED
        for (int k = 0; k < 2; ++k) {
            const __m512d low = (__m512d)b[i + k], high = (__m512d)b[i + 2 + k];
            a[i + 2 * k] = (__m512)_mm512_unpacklo_pd(low, high);
            a[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    }
    // a[4 * r + c] has, in each of its four parts p, column 4 * p + c of the rows from 4 * r.
    UNROLLED
    for (int c = 0; c < 4; ++c) {
        const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
        const __m512 even_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        to[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        to[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        to[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        to[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
}

}  // namespace dots
}  // namespace VARIANT

#include "lines.h"
#include "strips.h"
#include "fused.h"
#include "panels.h"

namespace VARIANT {
namespace dots {

template <class Kind, int BITS>
TARGET void prepare_bits(PackedLinear &job) {
    const Method method = method_of(job);
    if (method == Method::lines) return prepare_line<Kind, BITS>(job);
    job.tiled = true;
    job.block = method == Method::strips ? PANEL : BLOCK_PANELS * PANEL;
    job.piece = method == Method::strips ? 4 * PANEL : PIECE_PANELS * PANEL;
    prepare_strips<Kind>(job);
}
template <class Kind, int BITS>
TARGET void multiply_bits(const PackedLinear &job, int64_t begin, int64_t end) {
    const Method method = method_of(job);
    if (method == Method::lines) return multiply_lines<Kind, BITS>(job, begin, end);
    if (method == Method::strips) return multiply_fused<Kind, BITS>(job, begin, end);
    multiply_panels<Kind, BITS>(job, begin, end);
}

// Call `work` with the kind of x and the bits of W.
template <class Work>
inline void with_kind(const PackedLinear &job, const Work &work) {
    constexpr std::integral_constant<int, 4> FOUR;
    constexpr std::integral_constant<int, 8> EIGHT;
    if (job.rounded) job.bits == 4 ? work(Bytes(), FOUR) : work(Bytes(), EIGHT);
    else job.bits == 4 ? work(Pairs(), FOUR) : work(Pairs(), EIGHT);
}

inline void prepare(PackedLinear &job) {
    job.block = STRIP;
    with_kind(job, [&](auto kind, auto bits) { prepare_bits<decltype(kind), bits()>(job); });
}
inline void order(const PackedLinear &job, int64_t first, int64_t last) {
    with_kind(job, [&](auto kind, auto bits) { order_strips<decltype(kind), bits()>(job, first, last); });
}
inline void multiply(const PackedLinear &job, int64_t begin, int64_t end) {
    with_kind(job, [&](auto kind, auto bits) { multiply_bits<decltype(kind), bits()>(job, begin, end); });
}

}  // namespace dots
}  // namespace VARIANT
