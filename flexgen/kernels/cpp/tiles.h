// Products of tiles: TILE_WEIGHTS rows of W times TILE_X rows of x, with the sums in registers. The lanes of a sum run
// along the values, because both matrices are row-major. They are added up when a tile is complete.
//
// DEPTH_BYTES of each row are multiplied before the next DEPTH_BYTES, so that the rows of W of a tile stay in the L1
// cache for all tiles of a block of x, and the block of x stays in the L2 cache for all rows of W (Goto and van de
// Geijn, "Anatomy of high-performance matrix multiplication", 2008). With few rows of x, reading W takes longer than
// the arithmetic. So each tile prefetches its share of the next rows of W, to the L2 cache: rows of W often share the
// sets of the L1 cache, which would evict the present ones.
#pragma once

#include <type_traits>
#include <utility>

namespace VARIANT {
namespace linear {

constexpr int TILE_X = 4;
constexpr int TILE_WEIGHTS = SUM_REGISTERS == 16 ? 6 : 3;  // with these and one row of x, all registers are in use
constexpr int64_t DEPTH_BYTES = 4096;
constexpr int64_t AT_ONCE = 64;  // rows of x that are multiplied with the same rows of W
constexpr int SUM_VECTORS = (TILE_X * TILE_WEIGHTS + LANES - 1) / LANES;  // the sums of a tile, one float each

// Products in float32: rows of x are widened once, rows of W (of type W) in registers.
template <class W>
struct Widened {
    typedef float X;
    typedef W Weight;
    typedef Vec Values;
    static constexpr int64_t STEP = LANES;  // values in a register

    template <class T>
    INLINE static Vec values(const T *from) { return load(from); }
    template <class T>
    INLINE static Vec values_part(const T *from, int64_t count) { return load_part(from, count); }
    INLINE static Vec add(Vec sum, Vec weights, Vec values) { return fma(weights, values, sum); }
};

#ifdef FLEXGEN_DOT_BF16
// Products of pairs in bfloat16, with sums in float32.
struct Paired {
    typedef Bf16 X;
    typedef Bf16 Weight;
    typedef __m512bh Values;
    static constexpr int64_t STEP = 2 * LANES;

    INLINE static __m512bh values(const Bf16 *from) { return (__m512bh)_mm512_loadu_si512(from); }
    INLINE static __m512bh values_part(const Bf16 *from, int64_t count) {
        return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from);
    }
    INLINE static Vec add(Vec sum, __m512bh weights, __m512bh values) {
        return _mm512_dpbf16_ps(sum, weights, values);
    }
};
#endif

// The values that are multiplied at a time: with integers, whole groups of W.
template <class X>
int64_t depth_of(const PackedLinear &job) {
    constexpr int64_t DEPTH = DEPTH_BYTES / sizeof(X);
    return job.bits == 16 ? DEPTH : std::max<int64_t>(DEPTH / job.group, 1) * job.group;
}

// The distance between rows of `count` values. It is not a power of two, so that rows do not share cache sets.
template <class X>
constexpr int64_t pitch_of(int64_t count) {
    return whole(count * sizeof(X), LINE) / sizeof(X) + LINE / sizeof(X);
}

inline int64_t rows_at_once(const PackedLinear &job) {
    const int64_t blocks = (job.rows + AT_ONCE - 1) / AT_ONCE;
    return whole((job.rows + blocks - 1) / blocks, TILE_X);
}

// Widen values `from` to `from` + `count` of a row of W, with zeros up to a whole cache line.
template <class W>
TARGET void fill_plain(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    std::fill(to + count, to + whole(count, LINE / sizeof(float)), 0.0f);
    widen((const W *)job.packed + row * job.in + from, to, count);
}

// The same for whole groups of integers.
template <int BITS>
TARGET void fill_packed(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    const int64_t octets = job.group * BITS / 8;
    for (int64_t g = row * job.groups() + from / job.group; count > 0; ++g, count -= job.group, to += job.group) {
        float both[2];
        widen(job.scale_type, job.scales, g, both, 1);
        widen(job.scale_type, job.minimums, g, both + 1, 1);
        const Vec scale = splat(both[0]), minimum = splat(both[1]);
        for (int64_t i = 0; i < octets; i += LANES) {
            const Words codes = load_octets(job.packed + g * octets + i);
            for (int part = 0; part < 8 / BITS; ++part) {
                const Words q = BITS == 8 ? codes : part ? codes >> 4 : codes & 15;
                store(to + part * octets + i, fma(to_float(q), scale, minimum));
            }
        }
    }
}

TARGET inline void fill(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    if (job.bits == 4) return fill_packed<4>(job, row, from, count, to);
    if (job.bits == 8) return fill_packed<8>(job, row, from, count, to);
    if (job.scale_type == Type::bfloat16) return fill_plain<Bf16>(job, row, from, count, to);
    fill_plain<Half>(job, row, from, count, to);
}

// Copy values of a row in bfloat16, with zeros up to a whole cache line.
TARGET inline void fill(const PackedLinear &job, int64_t row, int64_t from, int64_t count, Bf16 *to) {
    memcpy(to, (const Bf16 *)job.packed + row * job.in + from, count * sizeof(Bf16));
    std::fill(to + count, to + whole(count, LINE / sizeof(Bf16)), Bf16{0});
}

// Rows of W to prefetch during a tile, and their bytes for one step.
struct Next {
    const uint8_t *rows[TILE_WEIGHTS];
    int64_t step;
};

template <int... N>
using Numbers = std::integer_sequence<int, N...>;
constexpr int TILE_SUMS = TILE_X * TILE_WEIGHTS;
typedef Vec Sums[TILE_SUMS];  // row by row of x

// Row `M` of a tile with columns `N`. All indices are constants, so that compilers keep the sums in registers.
template <class Kind, int M, int... N>
INLINE void add_row(Sums &sum, const typename Kind::Values (&weights)[TILE_WEIGHTS], const typename Kind::X *x,
                    Numbers<N...>) {
    const typename Kind::Values values = Kind::values(x);
    ((sum[M * TILE_WEIGHTS + N] = Kind::add(sum[M * TILE_WEIGHTS + N], weights[N], values)), ...);
}
// Vector `V` of the totals of a tile. Lane i is the sum of the lanes of sum number V * LANES + i.
template <int V, int... I>
INLINE Vec total(const Sums &sum, Numbers<I...>) {
    const Vec some[] = {V * LANES + I < TILE_SUMS ? sum[(V * LANES + I) % TILE_SUMS] : Vec{}...};
    return sums(some);
}

// Multiply `depth` values of the rows of w with rows of x, `pitch` apart. Add the products to `totals`, or set them.
template <class Kind, int AHEAD, int... M, int... N, int... V>
APART void multiply_tile(const typename Kind::Weight *const (&w)[TILE_WEIGHTS], const typename Kind::X *x,
                         int64_t pitch, int64_t depth, float *totals, bool add, const Next &next, Numbers<M...>,
                         Numbers<N...> columns, Numbers<V...>) {
    Sums sum = {};
    for (int64_t i = 0; i < depth; i += Kind::STEP) {
        const typename Kind::Values weights[] = {Kind::values(w[N] + i)...};
        if constexpr (AHEAD > 0) {
            const int64_t at = i / Kind::STEP * next.step;
            if (at % LINE < next.step) {
                for (int k = 0; k < AHEAD; ++k) __builtin_prefetch(next.rows[k] + at, 0, 2);
            }
        }
        (add_row<Kind, M>(sum, weights, x + M * pitch + i, columns), ...);
    }
    const auto lanes = std::make_integer_sequence<int, LANES>();
    const Vec found[] = {total<V>(sum, lanes)...};
    for (int v = 0; v < SUM_VECTORS; ++v, totals += LANES) store(totals, add ? load(totals) + found[v] : found[v]);
}

template <class Kind, int AHEAD>
TARGET void multiply_tile(const typename Kind::Weight *const (&w)[TILE_WEIGHTS], const typename Kind::X *x,
                          int64_t pitch, int64_t depth, float *totals, bool add, const Next &next) {
    multiply_tile<Kind, AHEAD>(w, x, pitch, depth, totals, add, next, std::make_integer_sequence<int, TILE_X>(),
                               std::make_integer_sequence<int, TILE_WEIGHTS>(),
                               std::make_integer_sequence<int, SUM_VECTORS>());
}

// The tiles of the same rows of W with all rows of x of a block. Each one prefetches its share of the next rows.
template <class Kind>
TARGET void multiply_tiles(const typename Kind::Weight *const (&w)[TILE_WEIGHTS], const typename Kind::X *x,
                           int64_t tiles, int64_t pitch, int64_t depth, float *totals, bool add, const Next &next) {
    for (int64_t t = 0; t < tiles; ++t, x += TILE_X * pitch, totals += SUM_VECTORS * LANES) {
        const int64_t first = t * TILE_WEIGHTS / tiles, count = (t + 1) * TILE_WEIGHTS / tiles - first;
        Next own = next;
        for (int64_t k = 0; k < count; ++k) own.rows[k] = next.rows[first + k];
        if (count == 0) multiply_tile<Kind, 0>(w, x, pitch, depth, totals, add, own);
        else if (count == 1) multiply_tile<Kind, 1>(w, x, pitch, depth, totals, add, own);
        else if (count == 2) multiply_tile<Kind, 2>(w, x, pitch, depth, totals, add, own);
        else if (count == 3) multiply_tile<Kind, 3>(w, x, pitch, depth, totals, add, own);
        else multiply_tile<Kind, TILE_WEIGHTS>(w, x, pitch, depth, totals, add, own);
    }
}

// Write the totals of rows `n` to `n` + `count` of W with `rows` rows of x, starting at row `m`.
template <class T>
TARGET void write_tiles(const PackedLinear &job, const float *totals, int64_t m, int64_t rows, int64_t n,
                        int64_t count) {
    float bias[LANES] = {};  // of TILE_WEIGHTS rows
    if (job.bias) widen(job.type, job.bias, n, bias, count);
    float biases[SUM_VECTORS * LANES] = {};
    for (int i = 0; i < TILE_SUMS; ++i) biases[i] = bias[i % TILE_WEIGHTS];
    for (int64_t i = 0; i < rows; i += TILE_X, totals += SUM_VECTORS * LANES) {
        T found[SUM_VECTORS * LANES];
        for (int v = 0; v < SUM_VECTORS; ++v)
            store(found + v * LANES, load(totals + v * LANES) + load(biases + v * LANES));
        for (int64_t k = 0; k < std::min<int64_t>(TILE_X, rows - i); ++k)
            memcpy((T *)job.y + (m + i + k) * job.out + n, found + k * TILE_WEIGHTS, count * sizeof(T));
    }
}

// Multiply rows `begin` to `end` of W with `rows` rows of x, starting at row `m`. DIRECT: read W in its
// place, otherwise in pieces that are first converted to the type of x.
template <class Kind, bool DIRECT>
TARGET void multiply_at_once(const PackedLinear &job, int64_t begin, int64_t end, int64_t m, int64_t rows) {
    typedef typename Kind::X X;
    typedef typename Kind::Weight W;
    const int64_t most = depth_of<X>(job), tiles = (rows + TILE_X - 1) / TILE_X, pitch = pitch_of<X>(job.in);
    const int64_t block = tiles * SUM_VECTORS * LANES;
    static thread_local std::vector<float> room;
    const int64_t filled = DIRECT ? 0 : TILE_WEIGHTS * pitch_of<X>(most) * sizeof(X) / sizeof(float);
    float *totals = aligned(room, filled + (end - begin + TILE_WEIGHTS - 1) / TILE_WEIGHTS * block) + filled;
    X *pieces = (X *)(totals - filled);
    const X *x = (const X *)job.operand + m * pitch;
    for (int64_t at = 0; at < job.in; at += most) {
        const int64_t count = std::min(most, job.in - at);
        float *to = totals;
        for (int64_t n = begin; n < end; n += TILE_WEIGHTS, to += block) {
            const bool last = n + TILE_WEIGHTS >= end;
            const int64_t next_row = last ? begin : n + TILE_WEIGHTS;
            const int64_t next_at = last ? std::min(at + most, job.in - 1) : at;
            const W *w[TILE_WEIGHTS];
            Next next;
            next.step = Kind::STEP * job.bits / 8;
            for (int k = 0; k < TILE_WEIGHTS; ++k) {
                const int64_t row = std::min(n + k, end - 1);  // memory beyond the last row must not be read
                if constexpr (DIRECT) {
                    w[k] = (const W *)job.packed + row * job.in + at;
                } else {
                    fill(job, row, at, count, pieces + k * pitch_of<X>(most));
                    w[k] = pieces + k * pitch_of<X>(most);
                }
                next.rows[k] = job.packed + (std::min(next_row + k, end - 1) * job.in + next_at) * job.bits / 8;
            }
            multiply_tiles<Kind>(w, x + at, tiles, pitch, whole(count, Kind::STEP), to, at > 0, next);
        }
    }
    for (int64_t n = begin; n < end; n += TILE_WEIGHTS, totals += block) {
        const int64_t count = std::min<int64_t>(TILE_WEIGHTS, end - n);
        if (job.type == Type::float32) write_tiles<float>(job, totals, m, rows, n, count);
        if (job.type == Type::bfloat16) write_tiles<Bf16>(job, totals, m, rows, n, count);
        if (job.type == Type::float16) write_tiles<Half>(job, totals, m, rows, n, count);
    }
}

template <class Kind, bool DIRECT>
TARGET void multiply_all(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t each = rows_at_once(job);
    for (int64_t m = 0; m < job.rows; m += each)
        multiply_at_once<Kind, DIRECT>(job, begin, end, m, std::min(each, job.rows - m));
}

TARGET inline void multiply_tiled(const PackedLinear &job, int64_t begin, int64_t end) {
#ifdef FLEXGEN_DOT_BF16
    if (by_pairs(job)) {
        if (job.in % Paired::STEP == 0) return multiply_all<Paired, true>(job, begin, end);
        return multiply_all<Paired, false>(job, begin, end);
    }
#endif
    if (job.rows > WIDENED_IN_TILES || job.bits != 16 || job.in % LANES) return multiply_all<Widened<float>, false>(job, begin, end);
    if (job.scale_type == Type::bfloat16) return multiply_all<Widened<Bf16>, true>(job, begin, end);
    multiply_all<Widened<Half>, true>(job, begin, end);
}

// Copy x (whole tiles of rows, `pitch_of` values each), with zeros where a tile reads beyond a row or the last row.
TARGET inline void prepare_tiled(PackedLinear &job) {
    job.tiled = true;
    const int64_t rows = whole(job.rows, TILE_X), item = by_pairs(job) ? sizeof(Bf16) : sizeof(float);
    const int64_t pitch = by_pairs(job) ? pitch_of<Bf16>(job.in) : pitch_of<float>(job.in);
    auto *to = (uint8_t *)aligned(job.wide, rows * pitch * item / sizeof(float));
    job.operand = to;
    for (int64_t row = 0; row < rows; ++row, to += pitch * item) {
        const int64_t there = row < job.rows ? job.in : 0;
        if (by_pairs(job)) memcpy(to, (const Bf16 *)job.x + row * job.in, there * item);
        else if (there) widen(job.type, job.x, row * job.in, (float *)to, there);
        memset(to + there * item, 0, (pitch - there) * item);
    }
}

// For one row of x, no weight is read twice. Each row of W is read from beginning to end, in the order of memory, which
// processors prefetch best.

constexpr int CHAINS = 8;  // independent sums for a row, because a sum takes several cycles
constexpr int64_t AHEAD_BYTES = 8192;

template <class Kind>
INLINE Vec row_sums(const typename Kind::Weight *w, const typename Kind::X *x, int64_t count) {
    Vec sum[CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS * Kind::STEP <= count; i += CHAINS * Kind::STEP) {
        for (int c = 0; c < CHAINS; ++c) {
            const int64_t at = i + c * Kind::STEP;
            if (at * sizeof *w % LINE == 0) __builtin_prefetch((const uint8_t *)(w + at) + AHEAD_BYTES, 0, 2);
            sum[c] = Kind::add(sum[c], Kind::values(w + at), Kind::values(x + at));
        }
    }
    for (; i + Kind::STEP <= count; i += Kind::STEP) sum[0] = Kind::add(sum[0], Kind::values(w + i), Kind::values(x + i));
    if (i < count)
        sum[1] = Kind::add(sum[1], Kind::values_part(w + i, count - i), Kind::values_part(x + i, count - i));
    for (int half = CHAINS / 2; half; half /= 2)
        for (int c = 0; c < half; ++c) sum[c] += sum[c + half];
    return sum[0];
}

template <class Kind>
TARGET void multiply_vector(const PackedLinear &job, int64_t begin, int64_t end) {
    const auto *x = (const typename Kind::X *)job.operand;
    const auto *w = (const typename Kind::Weight *)job.packed;
    for (int64_t n = begin; n < end; n += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - n);
        Vec sum[LANES] = {};
        for (int64_t k = 0; k < count; ++k) sum[k] = row_sums<Kind>(w + (n + k) * job.in, x, job.in);
        float bias[LANES] = {};
        if (job.bias) widen(job.type, job.bias, n, bias, count);
        const Vec totals = sums(sum) + load(bias);
        if (job.type == Type::float32) store_part((float *)job.y + n, totals, count);
        if (job.type == Type::bfloat16) store_part((Bf16 *)job.y + n, totals, count);
        if (job.type == Type::float16) store_part((Half *)job.y + n, totals, count);
    }
}

TARGET inline void multiply_plain_vector(const PackedLinear &job, int64_t begin, int64_t end) {
#ifdef FLEXGEN_DOT_BF16
    if (by_pairs(job)) return multiply_vector<Paired>(job, begin, end);
#endif
    if (job.scale_type == Type::bfloat16) return multiply_vector<Widened<Bf16>>(job, begin, end);
    multiply_vector<Widened<Half>>(job, begin, end);
}

}  // namespace linear
}  // namespace VARIANT
