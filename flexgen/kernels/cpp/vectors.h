// Vectors of LANES floats for one variant. Before the include, the variant defines:
//   VARIANT   the namespace
//   TARGET    the function attribute that enables the instruction set
//   LANES     floats per register
//   SUM_REGISTERS  accumulators that fit in registers together with the operands of a loop
// After the include, it defines the functions that are only declared here, and `sums`.
#include "kernels.h"

#define INLINE TARGET inline __attribute__((always_inline))

// Loops that use all registers are separate functions. Together with a caller's variables, compilers would store
// vectors in memory and addresses in vector registers. Arrays of vectors become registers when the loops over them are
// unrolled.
#define APART TARGET __attribute__((noinline))
#define UNROLLED _Pragma("GCC unroll 32")
#define INLINE_LAMBDA TARGET __attribute__((always_inline))

namespace VARIANT {

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

INLINE Vec splat(float x);
INLINE Vec fma(Vec a, Vec b, Vec c);
INLINE Vec from_half(Shorts x);
INLINE Shorts to_half(Vec x);
INLINE float from_half_scalar(uint16_t x);
INLINE Words to_words(Shorts x);
INLINE Words load_octets(const uint8_t *from);
INLINE void store_octets(uint8_t *to, Words x);  // each lane is below 256
INLINE Shorts load_signed(const uint8_t *from);  // octets with their sign
INLINE Vec lookup(const float *table, Words codes);  // of 16 values, by the last four bits of each word
INLINE Vec permute(Vec x, Words lanes);  // lane i of the result is x[lanes[i]]; lanes below LANES

template <class V>
INLINE V raw(const void *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE Vec load(const float *from) { return raw<Vec>(from); }
INLINE Vec load(const Bf16 *from) {
    return (Vec)(to_words(raw<Shorts>(from)) << 16);
}
INLINE Vec load(const Half *from) { return from_half(raw<Shorts>(from)); }

// One element. A vector with one element would be loaded from memory after a store, which takes longer.
INLINE float scalar(const Bf16 *x) {
    const uint32_t bits = (uint32_t)x->bits << 16;
    return raw<float>(&bits);
}
INLINE float scalar(const Half *x) { return from_half_scalar(x->bits); }

// A run of elements, widened in the order with the fewest operations. Queries, keys and sums have the same order.
// Variants may define better ones.
template <class T>
struct Run {
    static constexpr int VECTORS = 1;
    INLINE static void widen(const T *from, Vec (&to)[1]) { to[0] = load(from); }
};
// The number of elements of `dim` in whole runs. The rest is widened in element order.
template <class T>
inline int64_t in_runs(int64_t dim) {
    constexpr int64_t RUN = Run<T>::VECTORS * LANES;
    return dim / RUN * RUN;
}

// Converts words below 2^31.
INLINE Vec to_float(Words x) { return __builtin_convertvector((Ints)x, Vec); }

INLINE void store(float *to, Vec x) { memcpy(to, &x, sizeof x); }
INLINE void store(Bf16 *to, Vec x) {
    Words bits = (Words)x;
    bits += 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    const Shorts high = __builtin_convertvector(bits >> 16, Shorts);
    memcpy(to, &high, sizeof high);
}
INLINE void store(Half *to, Vec x) {
    const Shorts halves = to_half(x);
    memcpy(to, &halves, sizeof halves);
}

// Load or store the first `count` < LANES elements. The others are zero, or unchanged in memory.
template <class T>
INLINE Vec load_part(const T *from, int64_t count) {
    T part[LANES] = {};
    memcpy(part, from, count * sizeof(T));
    return load(part);
}
template <class T>
INLINE void store_part(T *to, Vec x, int64_t count) {
    T part[LANES];
    store(part, x);
    memcpy(to, part, count * sizeof(T));
}

// Rounded to T and back, as a tensor of that type would store it.
template <class T>
INLINE Vec rounded(Vec x) {
    T stored[LANES];
    store(stored, x);
    return load(stored);
}

INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// exp(x) for x <= 0, with an error of about two units in the last place (the polynomial of Cephes).
INLINE Vec exponential(Vec x) {
    const Vec lowest = splat(-87.0f), shift = splat(12582912.0f);  // 1.5 * 2^23: its last bits count units
    const Vec clipped = x < lowest ? lowest : x;
    const Vec shifted = fma(clipped, splat(1.44269504f), shift);
    const Vec n = shifted - shift;
    Vec r = fma(n, splat(-0.693359375f), clipped);
    r = fma(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    const Vec power = (Vec)(((Words)shifted << 23) + 0x3f800000u);
    return x < lowest ? Vec{} : p * power;
}

}  // namespace VARIANT
