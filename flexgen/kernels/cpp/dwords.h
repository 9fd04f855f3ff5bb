// Group-wise integers that are decoded from dwords in float32, for processors without dot products. Codes that are in the same
// place of their dwords become a vector. x is put in this order once.
#pragma once

namespace VARIANT {
namespace linear {
namespace dwords {

constexpr int64_t CHUNK = LANES * (int64_t)sizeof(uint32_t);  // bytes of codes in a vector

template <int BITS>
struct Codes {
    static constexpr int PARTS = 32 / BITS;  // the codes of a dword
    static constexpr int64_t VALUES = PARTS * LANES;  // of a chunk
    static constexpr int64_t LEAST_CHUNKS = DWORDS_GROUP / VALUES;  // of a group
    static_assert(DWORDS_GROUP % VALUES == 0, "a chunk has codes of only one group");

    INLINE static Vec code(Words dwords, int part) {
        const Words shifted = dwords >> BITS * part;
        return to_float(part == PARTS - 1 ? shifted : shifted & MASK);
    }

    // A code times a power of two: without a shift, except for the last code, because conversions are signed.
    INLINE static Vec code_in_place(Words dwords, int part) {
        return part == PARTS - 1 ? code(dwords, part) : to_float(dwords & (MASK << BITS * part));
    }
    // What x is multiplied with, to be multiplied with `code_in_place`.
    static constexpr float factor(int part) { return part == PARTS - 1 ? 1.0f : 1.0f / (1u << BITS * part); }

private:
    static constexpr uint32_t MASK = (1u << BITS) - 1;
};

// Vector i of the result has octet i of each dword, of 32 octets.
INLINE void by_octets(const float *from, Vec (&to)[4]) {
    __m256 some[4];
    UNROLLED
    for (int i = 0; i < 4; ++i) some[i] = _mm256_set_m128(_mm_loadu_ps(from + 16 + 4 * i), _mm_loadu_ps(from + 4 * i));
    const __m256d a = (__m256d)_mm256_unpacklo_ps(some[0], some[1]), b = (__m256d)_mm256_unpacklo_ps(some[2], some[3]);
    const __m256d c = (__m256d)_mm256_unpackhi_ps(some[0], some[1]), d = (__m256d)_mm256_unpackhi_ps(some[2], some[3]);
    to[0] = (Vec)_mm256_unpacklo_pd(a, b);
    to[1] = (Vec)_mm256_unpackhi_pd(a, b);
    to[2] = (Vec)_mm256_unpacklo_pd(c, d);
    to[3] = (Vec)_mm256_unpackhi_pd(c, d);
}

// The values of `groups` groups in the order of their codes: for each chunk, a vector for each part. IN_PLACE: for
// `code_in_place`.
template <int BITS, bool IN_PLACE>
TARGET void order_groups(const float *row, int64_t group, int64_t groups, float *to) {
    typedef Codes<BITS> Kind;
    constexpr int EACH = 8 / BITS;  // the codes of an octet. Those of a group with two: all first ones, then all second ones
    const int64_t octets = group / EACH;
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t at = 0; at < octets; at += CHUNK, to += Kind::VALUES) {
            UNROLLED
            for (int code = 0; code < EACH; ++code) {
                Vec some[4];
                by_octets(row + g * group + code * octets + at, some);
                UNROLLED
                for (int i = 0; i < 4; ++i) {
                    const int part = EACH * i + code;
                    store(to + part * LANES, IN_PLACE ? some[i] * Kind::factor(part) : some[i]);
                }
            }
        }
}

}  // namespace dwords
}  // namespace linear
}  // namespace VARIANT
