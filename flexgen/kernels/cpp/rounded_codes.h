// Codes of group-wise integers and x rounded to int8, for AVX2. A group is 64 values. With its scale s, its minimum m and its
// codes q in W, and its scale t and its integers k in x:  x . w = s * t * (k . q) + m * t * sum(k). Sums of a group are exact
// integers.
//
// W and x are multiplied in dwords. With four bits, a dword has four codes in int8: vpmaddubsw adds two products to a short,
// and eight such sums fit in it. With eight bits, these products would saturate, so a dword has two codes in int16.
#pragma once

namespace VARIANT {
namespace bytes {

using linear::aligned;
using linear::LINE;
using linear::widen;
using linear::write_outputs;

constexpr int64_t VALUES = linear::DOTS_GROUP;  // of a group
constexpr int64_t AT_ONCE = 8;  // steps of a group whose products are added to the same sums

INLINE __m256i load_codes(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE __m256i zeros() { return _mm256_setzero_si256(); }

// Four codes of four bits in a dword, with the first half of the group in the low nibbles.
struct Nibbles {
    static constexpr int BITS = 4;
    static constexpr int64_t STEPS = VALUES / 4;  // dwords of a group of x
    static constexpr bool SHORT = true;  // sums of AT_ONCE products: 8 * 2 * 15 * 128 < 2^15

    INLINE static __m256i product(__m256i codes, __m256i x) { return _mm256_maddubs_epi16(codes, x); }
    INLINE static __m256i sum(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
    // Compilers would add several products to each other first, for which registers do not suffice.
    INLINE static void add(__m256i &sum, __m256i product) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product)); }
    INLINE static __m256i widened(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
    INLINE static void unpack(__m256i codes, __m256i &first, __m256i &second) {
        const __m256i mask = _mm256_set1_epi8(15);
        first = _mm256_and_si256(codes, mask);
        second = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
    }
    INLINE static void order(__m256i low, __m256i high, __m256i *to) {
        to[0] = low;
        to[1] = high;
    }
};

// Two codes of eight bits in a dword: of each four, the first and third, or the second and fourth.
struct Octets {
    static constexpr int BITS = 8;
    static constexpr int64_t STEPS = VALUES / 2;
    static constexpr bool SHORT = false;

    INLINE static __m256i product(__m256i codes, __m256i x) { return _mm256_madd_epi16(codes, x); }
    INLINE static __m256i sum(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
    INLINE static void add(__m256i &sum, __m256i product) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product)); }
    INLINE static __m256i widened(__m256i sum) { return sum; }
    INLINE static void unpack(__m256i codes, __m256i &first, __m256i &second) {
        first = _mm256_and_si256(codes, _mm256_set1_epi16(255));
        second = _mm256_srli_epi16(codes, 8);
    }
    INLINE static void order(__m256i low, __m256i high, __m256i *to) {
        to[0] = _mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8);
        to[1] = _mm256_srai_epi16(_mm256_slli_epi16(high, 8), 8);
        to[2] = _mm256_srai_epi16(low, 8);
        to[3] = _mm256_srai_epi16(high, 8);
    }
};

template <class Kind>
constexpr int64_t group_bytes = VALUES * Kind::BITS / 8;
// Vectors of codes of a group. Each is unpacked to two: one for the first half of the steps, and one for the second.
template <class Kind>
constexpr int64_t code_vectors = group_bytes<Kind> / (int64_t)sizeof(__m256i);

// A group of x: its dwords, which are integers to be multiplied with `scale`, and the sum of its values.
template <class Kind>
struct Ordered {
    alignas(LINE) uint32_t steps[Kind::STEPS];
    float sum, scale;
};

INLINE int32_t total_of(__m256i x) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE float largest_of(Vec x) {
    float lanes[LANES];
    store(lanes, x);
    return *std::max_element(lanes, lanes + LANES);
}

// Round group `g` of a row of x. With infinities or NaNs, the scale is NaN.
template <class Kind>
TARGET void round_group(const PackedLinear &job, int64_t row, int64_t g, Ordered<Kind> &to) {
    float x[VALUES];
    widen(job.type, job.x, row * job.in + g * VALUES, x, VALUES);
    Vec nothing;
    const Vec largest = linear::largest_sizes(x, VALUES, nothing);
    for (int lane = 1; lane < LANES; ++lane) nothing[0] += nothing[lane];
    to.scale = largest_of(largest) / 127.0f + nothing[0];
    const Vec step = splat(to.scale == 0.0f ? 1.0f : to.scale);
    __m256i total = zeros(), halves[2];
    for (int half = 0; half < 2; ++half) {
        __m256i words[4];
        for (int i = 0; i < 4; ++i) {
            words[i] = _mm256_cvtps_epi32((__m256)(load(x + (4 * half + i) * LANES) / step));
            total = _mm256_add_epi32(total, words[i]);
        }
        // Packing takes four values of each vector in turn.
        const __m256i first = _mm256_packs_epi32(words[0], words[1]), second = _mm256_packs_epi32(words[2], words[3]);
        halves[half] = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second),
                                                   _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    to.sum = to.scale * (float)total_of(total);
    Kind::order(halves[0], halves[1], (__m256i *)to.steps);
}

}  // namespace bytes
}  // namespace VARIANT
