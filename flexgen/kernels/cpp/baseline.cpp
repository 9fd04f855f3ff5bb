// The variant for every processor: the compiler maps vectors of four floats to the available instructions.
#define VARIANT baseline
#define TARGET
#define LANES 4
#define SUM_REGISTERS 4
#include "vectors.h"

namespace baseline {

INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

INLINE Vec from_half(Shorts x) {
    const Words half = __builtin_convertvector(x, Words);
    // Shifted to the exponent and mantissa of a float, the bits are x / 2^112, also for subnormals.
    const Vec scaled = (Vec)((half & 0x7fff) << 13) * 5.192296858534828e33f;
    const Words infinite = (Words)((half & 0x7c00) == 0x7c00) & 0x7f800000u;
    return (Vec)((Words)scaled | infinite | ((half & 0x8000) << 16));
}

INLINE uint16_t to_half_scalar(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
    if (size < 0x38800000) {  // subnormal: adding 0.5 rounds to units of 2^-24, ties to even
        float shifted;
        memcpy(&shifted, &size, sizeof shifted);
        shifted += 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}
INLINE Shorts to_half(Vec x) {
    Shorts halves;
    for (int i = 0; i < LANES; ++i) halves[i] = to_half_scalar(x[i]);
    return halves;
}
INLINE float from_half_scalar(uint16_t x) { return from_half(Shorts{x})[0]; }
INLINE Words to_words(Shorts x) { return __builtin_convertvector(x, Words); }
INLINE Words load_octets(const uint8_t *from) { return Words{from[0], from[1], from[2], from[3]}; }
INLINE void store_octets(uint8_t *to, Words x) {
    for (int i = 0; i < LANES; ++i) to[i] = (uint8_t)x[i];
}

INLINE Shorts load_signed(const uint8_t *from) {
    Shorts found;
    for (int i = 0; i < LANES; ++i) found[i] = (uint16_t)(int8_t)from[i];
    return found;
}
INLINE Vec lookup(const float *table, Words codes) {
    Vec found;
    for (int i = 0; i < LANES; ++i) found[i] = table[codes[i] & 15];
    return found;
}
INLINE Vec permute(Vec x, Words lanes) { return Vec{x[lanes[0]], x[lanes[1]], x[lanes[2]], x[lanes[3]]}; }

// Lane i of the result is the sum of all lanes of x[i].
INLINE Vec sums(const Vec (&x)[LANES]) {
    Vec sum;
    for (int i = 0; i < LANES; ++i) sum[i] = x[i][0] + x[i][1] + x[i][2] + x[i][3];
    return sum;
}

}  // namespace baseline

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

static bool supported() { return true; }

const Variant baseline_variant = {
    "baseline",
    supported,
    baseline::attention::attend_any,
    baseline::attention::merge_any,
    baseline::prefix::attend_any,
    baseline::groupwise::dequantise_any,
    baseline::groupwise::quantise_any,
    baseline::read,
    baseline::linear::multiply_registers,
    baseline::linear::prepare_any,
    baseline::linear::order_any,
    baseline::linear::multiply_any,
    baseline::encoded::decode_any,
    baseline::sparse::choose_any,
    baseline::sparse::attend_chosen_any,
    baseline::norms::normalise_any,
    baseline::rotation::rotate_any,
    baseline::elementwise::merge_parts_any,
    baseline::elementwise::silu_product_any,
    baseline::elementwise::add_any,
    baseline::largest::find_any,
    baseline::routing::route_any,
    baseline::routing::sum_any,
};
