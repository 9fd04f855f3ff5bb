// Group-wise integers and the x that they are multiplied with, for processors with dot products of short operands.
//
// A chunk is 64 values of a row of W. Its dwords are unpacked to vectors of operands, `steps` for each dword. An operand
// has the codes of a few values: two in bfloat16 or four in int8. Codes keep their places in the dword, and the values
// of x are put in the same order once: step s of a chunk meets dword s / steps.
//
// With the scale s, the minimum m and the codes q of a group:  x . w = s * (x . q) + m * sum(x). Codes are exact in
// both kinds of operands.
#pragma once

namespace VARIANT {
namespace dots {

using linear::aligned;
using linear::Method;
using linear::method_of;
using linear::padded;
using linear::widen;
using linear::write_outputs;

constexpr int64_t VALUES = linear::DOTS_GROUP;  // of a chunk
constexpr int64_t LINE = 64;  // bytes

INLINE __m512i load_line(const void *from) { return _mm512_loadu_si512(from); }
// A value that is used several times. Compilers would load it from memory for each use, and a core loads only one vector
// in a cycle.
INLINE __m512i kept(__m512i x) {
    asm("" : "+v"(x));
    return x;
}
INLINE __m512i broadcast(const uint32_t *from) { return _mm512_set1_epi32((int)*from); }

// 127.5 - i in bfloat16, in two tables of bytes.
struct Distances {
    uint8_t low[128] = {}, high[128] = {};
    constexpr Distances() {
        for (int i = 0; i < 128; ++i) {
            const int halves = 255 - 2 * i;  // always odd
            int exponent = 0;
            while (halves >> (exponent + 1)) ++exponent;
            const int bits = ((126 + exponent) << 7) | ((halves << (7 - exponent)) & 0x7f);
            low[i] = (uint8_t)bits;
            high[i] = (uint8_t)(bits >> 8);
        }
    }
};
alignas(LINE) constexpr Distances DISTANCES;

// x in bfloat16.
struct Pairs {
    typedef Vec Sum;
    static constexpr int EACH = 2;  // values of an operand
    static constexpr bool ROUNDED = false;

    // An operand is `factor * (code + offset)`.
    static constexpr float factor(int bits) { return bits == 4 ? 2.0f : 1.0f; }
    static constexpr float offset(int bits) { return bits == 4 ? 16.0f : -127.5f; }

    INLINE static Sum add(Sum sum, __m512i codes, __m512i x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)codes, (__m512bh)x);
    }
    // Compilers would load x to a register first.
    INLINE static Sum add_each(Sum sum, __m512i codes, const uint32_t *x) {
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*x));
        return sum;
    }
    INLINE static Sum both(Sum a, Sum b) { return a + b; }
    INLINE static Vec number(Sum sum) { return sum; }

    // A word of a dword has four codes, the first in its low bits. The last bit of 32 in bfloat16 counts quarters, so a code
    // that ends three bits before it counts twice.
    INLINE static void unpack(__m512i dwords, __m512i (&to)[4], std::integral_constant<int, 4>) {
        const __m512i mask = _mm512_set1_epi16(0x0078), base = _mm512_set1_epi16(0x4200);  // 0xea: a & b | c
        to[0] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(dwords, 3), mask, base, 0xea);
        to[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(dwords, 1), mask, base, 0xea);
        to[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(dwords, 5), mask, base, 0xea);
        to[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(dwords, 9), mask, base, 0xea);
    }

    // A line of codes, in another order: operand `2 * half + part` has, of each 16 bytes of codes, the 8 bytes of a part.
    // With four bits, the halves are the low and the high nibbles. 32 in bfloat16 has a low byte of zero, so a shift and a
    // mask give the low bytes of all operands of a half.
    INLINE static void unpack_line(__m512i codes, __m512i (&to)[4], std::integral_constant<int, 4>) {
        const __m512i mask = _mm512_set1_epi8(0x78), high = _mm512_set1_epi8(0x42);
        const __m512i first = _mm512_and_si512(_mm512_slli_epi16(codes, 3), mask);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 1), mask);
        to[0] = _mm512_unpacklo_epi8(first, high);
        to[1] = _mm512_unpackhi_epi8(first, high);
        to[2] = _mm512_unpacklo_epi8(second, high);
        to[3] = _mm512_unpackhi_epi8(second, high);
    }
    INLINE static void unpack_line(__m512i codes, __m512i (&to)[2], std::integral_constant<int, 8>) {
        __m512i low, high;
        split(codes, low, high);
        to[0] = _mm512_unpacklo_epi8(low, high);
        to[1] = _mm512_unpackhi_epi8(low, high);
    }

    INLINE static void unpack(__m512i codes, __m512i (&to)[2], std::integral_constant<int, 8>) {
        __m512i low, high;
        split(codes, low, high);
        const __mmask64 second = 0xaaaaaaaaaaaaaaaa;  // bytes of each word
        to[0] = _mm512_mask_blend_epi8(second, low, _mm512_slli_epi16(high, 8));
        to[1] = _mm512_mask_blend_epi8(second, _mm512_srli_epi16(low, 8), high);
    }

private:
    // The low and high bytes of the operands of codes of eight bits. Codes on both sides of 127.5 have the same distances
    // from it, so tables of 128 entries have all of them: the index of a code is the smaller one of itself and its
    // complement. Codes below 127.5 are negative.
    INLINE static void split(__m512i codes, __m512i &low, __m512i &high) {
        const __m512i index = _mm512_min_epu8(codes, _mm512_sub_epi8(kept(_mm512_set1_epi8(-1)), codes));
        low = _mm512_permutex2var_epi8(load_line(DISTANCES.low), index, load_line(DISTANCES.low + LINE));
        const __m512i distance =
            _mm512_permutex2var_epi8(load_line(DISTANCES.high), index, load_line(DISTANCES.high + LINE));
        high = _mm512_ternarylogic_epi32(distance, codes, _mm512_set1_epi8((char)0x80), 0xf2);  // 0xf2: a | ~b & c
    }
};

// x rounded to int8, with a scale for each group.
struct Bytes {
    typedef __m512i Sum;
    static constexpr int EACH = 4;
    static constexpr bool ROUNDED = true;

    static constexpr float factor(int) { return 1.0f; }
    static constexpr float offset(int) { return 0.0f; }

    INLINE static Sum add(Sum sum, __m512i codes, __m512i x) { return _mm512_dpbusd_epi32(sum, codes, x); }
    INLINE static Sum add_each(Sum sum, __m512i codes, const uint32_t *x) {
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*x));
        return sum;
    }
    INLINE static Sum both(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    INLINE static Vec number(Sum sum) { return _mm512_cvtepi32_ps(sum); }

    INLINE static void unpack(__m512i dwords, __m512i (&to)[2], std::integral_constant<int, 4>) {
        const __m512i mask = _mm512_set1_epi8(15);
        to[0] = _mm512_and_si512(dwords, mask);
        to[1] = _mm512_and_si512(_mm512_srli_epi16(dwords, 4), mask);
    }
    INLINE static void unpack(__m512i dwords, __m512i (&to)[1], std::integral_constant<int, 8>) { to[0] = dwords; }
    template <class Bits, int STEPS>
    INLINE static void unpack_line(__m512i codes, __m512i (&to)[STEPS], Bits bits) { unpack(codes, to, bits); }
};

template <class Kind, int BITS>
constexpr int steps_of = 32 / BITS / Kind::EACH;  // of a dword
template <class Kind>
constexpr int64_t chunk_steps = VALUES / Kind::EACH;

inline int64_t chunks_of(const PackedLinear &job) { return job.in / VALUES; }

// The values of chunk `c` of a row are two runs of 32. With four bits, the second one is in the high nibbles.
struct Places {
    int64_t first, second;
};
inline Places places(const PackedLinear &job, int64_t c) {
    if (job.bits == 8) return {c * VALUES, c * VALUES + VALUES / 2};
    const int64_t each = job.group / VALUES, first = c / each * job.group + c % each * (VALUES / 2);
    return {first, first + job.group / 2};
}

// For each step of a chunk, the indices of its two values in the runs.
template <int BITS>
struct PairOrder {
    uint16_t words[64] = {};
    constexpr PairOrder() {
        for (int step = 0; step < 32; ++step) {
            const int dword = BITS == 4 ? step / 4 : step / 2;
            const int octet = 4 * dword + (BITS == 4 ? step % 4 / 2 : step % 2);
            const int run = BITS == 4 ? step % 2 * 32 : 0;
            words[2 * step] = (uint16_t)(run + octet);
            words[2 * step + 1] = (uint16_t)(run + octet + 2);
        }
    }
};
template <int BITS>
alignas(LINE) constexpr PairOrder<BITS> PAIR_ORDER;

// A chunk of x in the order of the steps. The values are `steps` times `scale`, and their sum is `sum`.
struct Ordered {
    alignas(LINE) uint32_t steps[VALUES / 2];
    float sum, scale;
};

template <int BITS>
TARGET inline void order_chunk(const PackedLinear &job, int64_t row, int64_t c, Ordered &to, Pairs) {
    const Bf16 *x = (const Bf16 *)job.x + row * job.in;
    const Places at = places(job, c);
    const __m512i first = load_line(x + at.first), second = load_line(x + at.second);
    for (int half = 0; half < 2; ++half) {
        const __m512i places = load_line(PAIR_ORDER<BITS>.words + 32 * half);
        _mm512_store_si512(to.steps + 16 * half, _mm512_permutex2var_epi16(first, places, second));
    }
    Vec total = {};
    for (int i = 0; i < VALUES / 2; i += LANES) total += load(x + at.first + i) + load(x + at.second + i);
    to.sum = _mm512_reduce_add_ps(total);
    to.scale = 1.0f;
}

// A chunk is a group. With infinities or NaNs, the scale is NaN.
template <int BITS>
TARGET inline void order_chunk(const PackedLinear &job, int64_t row, int64_t c, Ordered &to, Bytes) {
    float x[VALUES];
    widen(job.type, job.x, row * job.in + c * VALUES, x, VALUES);
    Vec zeros;
    const Vec largest = linear::largest_sizes(x, VALUES, zeros);
    to.scale = _mm512_reduce_max_ps(largest) / 127.0f + _mm512_reduce_add_ps(zeros);
    const Vec step = splat(to.scale == 0.0f ? 1.0f : to.scale);
    __m512i total = {};
    int8_t codes[VALUES];
    for (int i = 0; i < VALUES; i += LANES) {
        const __m512i rounded = _mm512_cvtps_epi32(load(x + i) / step);
        total = _mm512_add_epi32(total, rounded);
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtsepi32_epi8(rounded));
    }
    to.sum = to.scale * (float)_mm512_reduce_add_epi32(total);
    // With four bits, the dwords of both halves alternate.
    const __m512i order = BITS == 8 ? _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                                    : _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_store_si512(to.steps, _mm512_permutexvar_epi32(order, load_line(codes)));
}

// The scales of a row of W for operands, and the minimums for operands of zero: one for each chunk, with space for
// whole vectors. They are zero beyond the last chunk.
template <class Kind, int BITS, class S>
INLINE void chunk_scales_as(const PackedLinear &job, int64_t row, float *scales, float *minimums) {
    const int64_t groups = job.groups(), each = job.group / VALUES, chunks = groups * each;
    const S *from = (const S *)job.scales + row * groups, *least = (const S *)job.minimums + row * groups;
    for (int64_t g = 0; g < groups; g += LANES) {
        const bool whole = g + LANES <= groups;
        const Vec some = whole ? load(from + g) : load_part(from + g, groups - g);
        const Vec shift = whole ? load(least + g) : load_part(least + g, groups - g);
        store(scales + g, some * (1.0f / Kind::factor(BITS)));
        store(minimums + g, fma(splat(-Kind::offset(BITS)), some, shift));
    }
    if (each == 1) return;
    for (int64_t c = padded(chunks); c-- > 0;) {
        scales[c] = c < chunks ? scales[c / each] : 0.0f;
        minimums[c] = c < chunks ? minimums[c / each] : 0.0f;
    }
}
template <class Kind, int BITS>
INLINE void chunk_scales(const PackedLinear &job, int64_t row, float *scales, float *minimums) {
    if (job.scale_type == Type::float16) return chunk_scales_as<Kind, BITS, Half>(job, row, scales, minimums);
    chunk_scales_as<Kind, BITS, Bf16>(job, row, scales, minimums);
}

}  // namespace dots
}  // namespace VARIANT
