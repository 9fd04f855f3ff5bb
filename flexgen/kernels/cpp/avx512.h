// AVX-512 operations, for the variants with and without bfloat16 dot products. A variant defines VARIANT and TARGET
// before it includes this file.
#include <immintrin.h>

#define LANES 16
#define SUM_REGISTERS 16
#include "vectors.h"

namespace VARIANT {

INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vec from_half(Shorts x) { return _mm512_cvtph_ps((__m256i)x); }
INLINE Shorts to_half(Vec x) {
    return (Shorts)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE float from_half_scalar(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
// `__builtin_convertvector` would be four shuffles.
INLINE Words to_words(Shorts x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE Words load_octets(const uint8_t *from) { return (Words)_mm512_cvtepu8_epi32(raw<__m128i>(from)); }
INLINE void store_octets(uint8_t *to, Words x) {
    const __m128i octets = _mm512_cvtepi32_epi8((__m512i)x);
    memcpy(to, &octets, sizeof octets);
}

INLINE Shorts load_signed(const uint8_t *from) { return (Shorts)_mm256_cvtepi8_epi16(raw<__m128i>(from)); }
INLINE Vec lookup(const float *table, Words codes) {
    return _mm512_permutexvar_ps((__m512i)codes, load(table));
}
INLINE Vec permute(Vec x, Words lanes) { return _mm512_permutexvar_ps((__m512i)lanes, x); }

// Load or store the first `count` < LANES elements, and no bytes beyond them.
INLINE Vec load_part(const float *from, int64_t count) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}
INLINE Shorts shorts_part(const void *from, int64_t count) {
    return (Shorts)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from);
}
INLINE Vec load_part(const Bf16 *from, int64_t count) { return (Vec)(to_words(shorts_part(from, count)) << 16); }
INLINE Vec load_part(const Half *from, int64_t count) { return from_half(shorts_part(from, count)); }

// A word has two elements. Take the even ones, then the odd ones: shuffles would use the same port as products.
template <>
struct Run<Bf16> {
    static constexpr int VECTORS = 2;
    INLINE static void widen(const Bf16 *from, Vec (&to)[2]) {
        const Words pairs = raw<Words>(from);
        to[0] = (Vec)(pairs << 16);
        to[1] = (Vec)(pairs & 0xffff0000u);
    }
};

// Lane i of the result is the sum of all lanes of x[i].
INLINE Vec sums(const Vec (&x)[LANES]) {
    Vec fours[4];
    for (int i = 0; i < 4; ++i) {
        const Vec *of = x + 4 * i;
        const Vec a = _mm512_unpacklo_ps(of[0], of[1]) + (Vec)_mm512_unpackhi_ps(of[0], of[1]);
        const Vec b = _mm512_unpacklo_ps(of[2], of[3]) + (Vec)_mm512_unpackhi_ps(of[2], of[3]);
        const __m512d c = (__m512d)a, d = (__m512d)b;
        fours[i] = (Vec)_mm512_unpacklo_pd(c, d) + (Vec)_mm512_unpackhi_pd(c, d);
    }
    const Vec a = (Vec)_mm512_shuffle_f32x4(fours[0], fours[1], 0x44) +
                  (Vec)_mm512_shuffle_f32x4(fours[0], fours[1], 0xee);
    const Vec b = (Vec)_mm512_shuffle_f32x4(fours[2], fours[3], 0x44) +
                  (Vec)_mm512_shuffle_f32x4(fours[2], fours[3], 0xee);
    return (Vec)_mm512_shuffle_f32x4(a, b, 0x88) + (Vec)_mm512_shuffle_f32x4(a, b, 0xdd);
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

}  // namespace VARIANT

#include "attention.h"
#include "elementwise.h"
#include "groupwise.h"
#include "largest.h"
#include "linear.h"
#include "norms.h"
#include "prefix.h"
#include "rotation.h"
#include "routing.h"
#include "sparse.h"
