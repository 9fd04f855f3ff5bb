#include "kernels.h"

#ifdef FLEXGEN_X86
#include <cpuid.h>
#include <immintrin.h>

#define VARIANT avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define SUM_REGISTERS 8
#define FLEXGEN_DWORDS  // products of one or a few rows of x with group-wise integers, in float32
#define FLEXGEN_FLOAT_OUTER  // products of many rows of x by outer products in float32
#define FLEXGEN_DOT_BYTES  // sums of products of int8, with vpmaddubsw and vpmaddwd
#include "vectors.h"

namespace avx2 {

INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec from_half(Shorts x) { return _mm256_cvtph_ps((__m128i)x); }
INLINE Shorts to_half(Vec x) {
    return (Shorts)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE float from_half_scalar(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
INLINE Words to_words(Shorts x) { return (Words)_mm256_cvtepu16_epi32((__m128i)x); }
INLINE Words load_octets(const uint8_t *from) {
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
INLINE void store_octets(uint8_t *to, Words x) {
    const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
    const __m128i shorts = _mm_packus_epi32(low, high);
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(shorts, shorts));
}

INLINE Shorts load_signed(const uint8_t *from) {
    return (Shorts)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)from));
}
INLINE Vec lookup(const float *table, Words codes) {
    const __m256 low = _mm256_permutevar8x32_ps(load(table), (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps(load(table + LANES), (__m256i)codes);
    return _mm256_blendv_ps(low, high, (__m256)(codes << 28));
}
INLINE Vec permute(Vec x, Words lanes) { return _mm256_permutevar8x32_ps(x, (__m256i)lanes); }

// Lane i of the result is the sum of all lanes of x[i].
INLINE Vec sums(const Vec (&x)[LANES]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return (Vec)_mm256_permute2f128_ps(a, b, 0x20) + (Vec)_mm256_permute2f128_ps(a, b, 0x31);
}

// Dword i of vector k becomes dword k of vector i.
template <class V>
INLINE void transpose(V (&x)[LANES]) {
    __m256i pairs[LANES], fours[LANES];
    UNROLLED
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32((__m256i)x[i], (__m256i)x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32((__m256i)x[i], (__m256i)x[i + 1]);
    }
    UNROLLED
    for (int i = 0; i < LANES; i += 4) {
        UNROLLED
        for (int k = 0; k < 2; ++k) {
            fours[i + 2 * k] = _mm256_unpacklo_epi64(pairs[i + k], pairs[i + k + 2]);
            fours[i + 2 * k + 1] = _mm256_unpackhi_epi64(pairs[i + k], pairs[i + k + 2]);
        }
    }
    UNROLLED
    for (int i = 0; i < 4; ++i) {
        x[i] = (V)_mm256_permute2x128_si256(fours[i], fours[4 + i], 0x20);
        x[4 + i] = (V)_mm256_permute2x128_si256(fours[i], fours[4 + i], 0x31);
    }
}

// Transpose 8 rows of floats with distance `stride`: `to[i]` is column i.
INLINE void transpose(const float *from, int64_t stride, Vec (&to)[LANES]) {
    UNROLLED
    for (int i = 0; i < LANES; ++i) to[i] = load(from + i * stride);
    transpose(to);
}

}  // namespace avx2

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

static bool supported() {
    unsigned eax, ebx, ecx, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}

const Variant avx2_variant = {
    "avx2",
    supported,
    avx2::attention::attend_any,
    avx2::attention::merge_any,
    avx2::prefix::attend_any,
    avx2::groupwise::dequantise_any,
    avx2::groupwise::quantise_any,
    avx2::read,
    avx2::linear::multiply_registers,
    avx2::linear::prepare_any,
    avx2::linear::order_any,
    avx2::linear::multiply_any,
    avx2::encoded::decode_any,
    avx2::sparse::choose_any,
    avx2::sparse::attend_chosen_any,
    avx2::norms::normalise_any,
    avx2::rotation::rotate_any,
    avx2::elementwise::merge_parts_any,
    avx2::elementwise::silu_product_any,
    avx2::elementwise::add_any,
    avx2::largest::find_any,
    avx2::routing::route_any,
    avx2::routing::sum_any,
};
#endif
