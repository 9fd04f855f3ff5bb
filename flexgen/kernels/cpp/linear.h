// Products with few rows of x and group-wise integers, for one variant. Each weight is unpacked in registers, multiplied
// with as many rows of x as fit in registers, and never written to memory. For many rows and for half types, see tiles.h
// and matrix_vector.h.
//
// Blocks of WEIGHTS rows of W are multiplied with blocks of X rows of x, with the sums in registers. Meanwhile, the
// codes of the next block are prefetched. Further blocks of x find the codes in the L1 cache.
#include <algorithm>

#if defined(FLEXGEN_DOT_BF16) || defined(FLEXGEN_FLOAT_OUTER)
#define FLEXGEN_OUTER  // the variant has Method::outer
#endif
#include "methods.h"

namespace VARIANT {
namespace linear {

constexpr int MAX_X = SUM_REGISTERS / 2;
constexpr int64_t LINE = 64;  // bytes
static_assert(SUM_REGISTERS <= LANES, "the sums of a block are added up as one vector");

// The rows of W that are multiplied at once with X rows of x.
constexpr int weights_beside(int x) { return SUM_REGISTERS / x < 4 ? SUM_REGISTERS / x : 4; }

// A block of rows of W, with its scales and minimums (WEIGHTS, padded groups) in float32.
template <int WEIGHTS>
struct Rows {
    const uint8_t *codes[WEIGHTS];
    std::vector<float> scales, minimums;
};

INLINE int64_t padded(int64_t groups) { return (groups + LANES - 1) / LANES * LANES; }

// x in float32: q * scale + minimum is exactly the float32 value that `dequantise` writes.
struct Wide {
    typedef float Operand;

    template <int BITS, int X, int WEIGHTS>
    INLINE static void add_group(const PackedLinear &job, const float *x, const Rows<WEIGHTS> &rows, int64_t g,
                                 int64_t stride, Vec (&sum)[LANES]) {
        const int64_t octets = job.group * BITS / 8;
        Vec scale[WEIGHTS], minimum[WEIGHTS];
        for (int n = 0; n < WEIGHTS; ++n) {
            scale[n] = splat(rows.scales[n * stride + g]);
            minimum[n] = splat(rows.minimums[n * stride + g]);
        }
        for (int64_t i = 0; i < octets; i += LANES) {
            Words codes[WEIGHTS];
            for (int n = 0; n < WEIGHTS; ++n) codes[n] = load_octets(rows.codes[n] + g * octets + i);
            for (int part = 0; part < 8 / BITS; ++part) {
                Vec w[WEIGHTS];
                for (int n = 0; n < WEIGHTS; ++n) {
                    const Words q = BITS == 8 ? codes[n] : part ? codes[n] >> 4 : codes[n] & 15;
                    w[n] = fma(to_float(q), scale[n], minimum[n]);
                }
                for (int m = 0; m < X; ++m) {
                    const Vec values = load(x + m * job.in + g * job.group + part * octets + i);
                    for (int n = 0; n < WEIGHTS; ++n) sum[n * X + m] = fma(w[n], values, sum[n * X + m]);
                }
            }
        }
    }
};

template <class S>
TARGET void widen(const S *from, float *to, int64_t count) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) store(to + at, load(from + at));
    if (at < count) store_part(to + at, load_part(from + at, count - at), count - at);
}
TARGET inline void widen(Type type, const void *from, int64_t at, float *to, int64_t count) {
    if (type == Type::float32) return widen((const float *)from + at, to, count);
    if (type == Type::bfloat16) return widen((const Bf16 *)from + at, to, count);
    widen((const Half *)from + at, to, count);
}

// The largest absolute value of each lane of x, and in `zeros` a NaN for values that are not finite.
INLINE Vec largest_sizes(const float *x, int64_t count, Vec &zeros) {
    Vec largest = {};
    zeros = Vec{};
    for (int64_t i = 0; i < count; i += LANES) {
        const Vec some = load(x + i);
        largest = larger(larger(some, -some), largest);
        zeros += some * 0.0f;
    }
    return largest;
}

TARGET inline void write(Type type, void *to, int64_t at, float value) {
    if (type == Type::float32) return store_part((float *)to + at, splat(value), 1);
    if (type == Type::bfloat16) return store_part((Bf16 *)to + at, splat(value), 1);
    store_part((Half *)to + at, splat(value), 1);
}

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

// Write to y the products of rows `m` to `m` + X of x with rows `n` to `n` + WEIGHTS of W, of which `count` exist.
template <int X, int WEIGHTS>
INLINE void write_totals(const PackedLinear &job, const Vec (&sum)[LANES], int64_t m, int64_t n, int count) {
    float totals[LANES];
    store(totals, sums(sum));
    for (int w = 0; w < count; ++w) {
        float bias = 0.0f;
        if (job.bias) widen(job.type, job.bias, n + w, &bias, 1);
        for (int i = 0; i < X; ++i) write(job.type, job.y, (m + i) * job.out + n + w, totals[w * X + i] + bias);
    }
}

// `rows`: rows `n` to `n` + `count` of W. The result goes to rows `m` to `m` + X of y.
template <class Kind, int BITS, int X, int WEIGHTS>
TARGET void multiply(const PackedLinear &job, const Rows<WEIGHTS> &rows, int64_t m, int64_t n, int count) {
    const int64_t groups = job.groups(), stride = padded(groups), octets = job.group * BITS / 8;
    const auto *x = (const typename Kind::Operand *)job.operand + m * job.in;
    Vec sum[LANES];
    for (Vec &each : sum) each = Vec{};
    const int64_t ahead = WEIGHTS * groups * octets;  // the next block
    for (int64_t g = 0; g < groups; ++g) {
        if (m == 0) {
            for (int w = 0; w < WEIGHTS; ++w)
                for (int64_t at = 0; at < octets; at += LINE)
                    __builtin_prefetch(rows.codes[w] + g * octets + at + ahead);
        }
        Kind::template add_group<BITS, X, WEIGHTS>(job, x, rows, g, stride, sum);
    }
    write_totals<X, WEIGHTS>(job, sum, m, n, count);
}

template <class Kind, int BITS, int X>
TARGET void multiply_rows(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int WEIGHTS = weights_beside(X);
    const int64_t groups = job.groups(), stride = padded(groups), octets = job.group * BITS / 8;
    Rows<WEIGHTS> rows;
    rows.scales.resize(WEIGHTS * stride);
    rows.minimums.resize(WEIGHTS * stride);
    for (int64_t n = begin; n < end; n += WEIGHTS) {
        for (int w = 0; w < WEIGHTS; ++w) {
            const int64_t row = std::min(n + w, end - 1);  // memory beyond the last row must not be read
            rows.codes[w] = job.packed + row * groups * octets;
            widen(job.scale_type, job.scales, row * groups, &rows.scales[w * stride], groups);
            widen(job.scale_type, job.minimums, row * groups, &rows.minimums[w * stride], groups);
        }
        const int count = (int)std::min<int64_t>(WEIGHTS, end - n);
        // The last block of x begins early enough to be complete, and computes some rows twice.
        for (int64_t m = 0; m < job.rows; m += X)
            multiply<Kind, BITS, X>(job, rows, std::min(m, job.rows - X), n, count);
    }
}

// Divide x into as few blocks as possible, of nearly equal size.
template <class Kind, int BITS, int X>
TARGET void multiply_blocks(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t blocks = (job.rows + MAX_X - 1) / MAX_X;
    if ((job.rows + blocks - 1) / blocks == X) return multiply_rows<Kind, BITS, X>(job, begin, end);
    if constexpr (X > 1) multiply_blocks<Kind, BITS, X - 1>(job, begin, end);
}

template <class Kind>
TARGET void multiply_bits(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.bits == 4) return multiply_blocks<Kind, 4, MAX_X>(job, begin, end);
    multiply_blocks<Kind, 8, MAX_X>(job, begin, end);
}

// Space for `count` floats, aligned to a cache line. Their values are any.
inline float *aligned(std::vector<float> &room, int64_t count) {
    const size_t size = count + LINE / sizeof(float);
    if (room.size() < size) room.resize(size);
    return (float *)(((uintptr_t)room.data() + LINE - 1) / LINE * LINE);
}

}  // namespace linear
}  // namespace VARIANT

#include "decode.h"
#include "tiles.h"
#include "matrix_vector.h"
#ifdef FLEXGEN_DWORDS
#include "dwords.h"
#include "one_row.h"
#include "few_rows.h"
#endif
#ifdef FLEXGEN_DOT_BF16
#include "outer.h"
#include "dots.h"
#elif defined(FLEXGEN_FLOAT_OUTER)
#include "float_outer.h"
#endif
#ifdef FLEXGEN_DOT_BYTES
#include "rounded.h"
#endif

namespace VARIANT {
namespace linear {

void multiply_any(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.encoding) return encoded::multiply(job, begin, end);
    switch (method_of(job)) {
    case Method::vector: return multiply_plain_vector(job, begin, end);
    case Method::tiles: return multiply_tiled(job, begin, end);
    case Method::blocks: return multiply_bits<Wide>(job, begin, end);
#ifdef FLEXGEN_DWORDS
    case Method::one_row: return one_row::multiply(job, begin, end);
    case Method::few_rows: return few_rows::multiply(job, begin, end);
#endif
#ifdef FLEXGEN_OUTER
    case Method::outer: return multiply_by_outer(job, begin, end);
#endif
#ifdef FLEXGEN_DOT_BF16
    default: return dots::multiply(job, begin, end);
#elif defined(FLEXGEN_DOT_BYTES)
    default: return bytes::multiply(job, begin, end);
#else
    default: return;
#endif
    }
}

constexpr int64_t WIDE_BYTES = 16 << 10;  // of a row of x in float32. A longer one would take most of the L1 cache

// Convert x to float32, unless it is multiplied in its own type or is widened in registers, like W.
TARGET inline void prepare_rows(PackedLinear &job) {
    job.operand = job.x;
    if (job.bits == 16) job.block = LANES;
    const bool narrow = job.bits == 16 && job.type == job.scale_type && job.in * (int64_t)sizeof(float) > WIDE_BYTES;
    if (by_pairs(job) || job.type == Type::float32 || narrow) return;
    float *wide = aligned(job.wide, job.rows * job.in);
    widen(job.type, job.x, 0, wide, job.rows * job.in);
    job.operand = wide;
}

// Convert x to the layout of `multiply_any`, once for all rows of W.
TARGET void prepare_any(PackedLinear &job) {
    if (job.encoding) return encoded::prepare(job);
    switch (method_of(job)) {
    case Method::vector:
    case Method::blocks: return prepare_rows(job);
    case Method::tiles: return prepare_tiled(job);
#ifdef FLEXGEN_DWORDS
    case Method::one_row: return one_row::prepare(job);
    case Method::few_rows: return few_rows::prepare(job);
#endif
#ifdef FLEXGEN_OUTER
    case Method::outer: return prepare_outer(job);
#endif
#ifdef FLEXGEN_DOT_BF16
    default: return dots::prepare(job);
#elif defined(FLEXGEN_DOT_BYTES)
    default: return bytes::prepare(job);
#else
    default: return;
#endif
    }
}

// Do parts of the conversion that `prepare_any` left.
void order_any(const PackedLinear &job, int64_t first, int64_t last) {
    if (method_of(job) == Method::tiles) return order_tiled(job, first, last);
#ifdef FLEXGEN_OUTER
    if (method_of(job) == Method::outer) return order_outer(job, first, last);
#endif
#ifdef FLEXGEN_DOT_BF16
    dots::order(job, first, last);
#elif defined(FLEXGEN_DOT_BYTES)
    bytes::order(job, first, last);
#endif
}

}  // namespace linear
}  // namespace VARIANT
