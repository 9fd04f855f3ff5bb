// Products of tiles: TILE_WEIGHTS rows of W times TILE_X rows of x, with the sums in registers. The lanes of a sum run
// along the values, because both matrices are row-major. They are added up when a tile is complete; meanwhile, the
// processor begins the next one.
//
// DEPTH_BYTES of each row are multiplied before the next DEPTH_BYTES. The rows of x of a tile stay in the L1 cache for
// all tiles of a band of W, and the band stays in the L2 cache for all rows of x (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", 2008). With few rows of x, reading W takes longer than the arithmetic. So
// each tile prefetches its share of the next band, to the L2 cache.
#pragma once

#include <utility>

namespace VARIANT {
namespace linear {

// More rows would fit in the registers of AVX-512, but rows of W often share the sets of the L1 cache, which have eight ways.
constexpr int TILE_X = 4, TILE_WEIGHTS = SUM_REGISTERS == 16 ? 4 : 3;
constexpr int64_t DEPTH_BYTES = 4096;
// The vectors of each row that are multiplied in one iteration. With AVX2, four take 13 % less time than one.
constexpr int STEPS = LANES == 8 ? 4 : 1;
constexpr int SUM_VECTORS = (TILE_X * TILE_WEIGHTS + LANES - 1) / LANES;  // the sums of a tile, one float each
constexpr int64_t TILE_TOTALS = SUM_VECTORS * LANES;
constexpr int64_t BAND_TILES = 8, BAND_ROWS = BAND_TILES * TILE_WEIGHTS, BAND_TOTALS = BAND_TILES * TILE_TOTALS;

// Products in float32: rows of W (of type W) are widened in registers, and rows of x (of type X_) too, unless they were
// widened before.
template <class W, class X_ = float>
struct Widened {
    typedef X_ X;
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

// The layout of x: for each depth, all rows with `pitch` values each, up to whole tiles. The pitch is not a power of two,
// so that rows do not share cache sets.
template <class X>
struct Operand {
    int64_t depth, depths, pitch, tiles;

    explicit Operand(const PackedLinear &job) : depth(depth_of<X>(job)), depths((job.in + depth - 1) / depth) {
        pitch = whole(std::min(depth, job.in) * sizeof(X), LINE) / sizeof(X) + LINE / sizeof(X);
        tiles = (job.rows + TILE_X - 1) / TILE_X;
    }
    // The index of the first value of row `m` in depth `d`.
    int64_t place(int64_t d, int64_t m) const { return (d * tiles * TILE_X + m) * pitch; }
    int64_t size() const { return place(depths, 0); }
};

// Widen values `from` to `from` + `count` of a row of W, with zeros up to a whole cache line.
template <class W>
TARGET void fill_plain(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    std::fill(to + count, to + whole(count, LINE / sizeof(float)), 0.0f);
    widen((const W *)job.packed + row * job.in + from, to, count);
}

// The same for whole groups of integers. GROUP: the size of a group, so that compilers make no loop, or 0 for any size.
template <class S, int BITS, int64_t GROUP>
TARGET void fill_packed(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    const int64_t group = GROUP ? GROUP : job.group, octets = group * BITS / 8;
    for (int64_t g = row * job.groups() + from / group; count > 0; ++g, count -= group, to += group) {
        const Vec scale = splat(scalar((const S *)job.scales + g));
        const Vec minimum = splat(scalar((const S *)job.minimums + g));
        UNROLLED
        for (int64_t i = 0; i < octets; i += LANES) {
            const Words codes = load_octets(job.packed + g * octets + i);
            UNROLLED
            for (int part = 0; part < 8 / BITS; ++part) {
                const Words q = BITS == 8 ? codes : part ? codes >> 4 : codes & 15;
                store(to + part * octets + i, fma(to_float(q), scale, minimum));
            }
        }
    }
}

template <class S, int BITS>
TARGET void fill_groups(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    constexpr int64_t USUAL = 64;
    if (job.group == USUAL) return fill_packed<S, BITS, USUAL>(job, row, from, count, to);
    fill_packed<S, BITS, 0>(job, row, from, count, to);
}

// S: the type of scales, or of W.
template <class S>
TARGET void fill_as(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    if (job.bits == 4) return fill_groups<S, 4>(job, row, from, count, to);
    if (job.bits == 8) return fill_groups<S, 8>(job, row, from, count, to);
    fill_plain<S>(job, row, from, count, to);
}
TARGET inline void fill(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    if (job.scale_type == Type::bfloat16) return fill_as<Bf16>(job, row, from, count, to);
    fill_as<Half>(job, row, from, count, to);
}

// Copy values of a row in bfloat16, with zeros up to a whole cache line.
TARGET inline void fill(const PackedLinear &job, int64_t row, int64_t from, int64_t count, Bf16 *to) {
    memcpy(to, (const Bf16 *)job.packed + row * job.in + from, count * sizeof(Bf16));
    std::fill(to + count, to + whole(count, LINE / sizeof(Bf16)), Bf16{0});
}

// Rows in memory.
template <class W>
struct Strided {
    const W *first;
    int64_t stride;  // from a row to the next one

    Strided from(int64_t row) const { return {first + row * stride, stride}; }
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

// Multiply `depth` values of rows of W with rows of x. Add the products to `totals`, or set them. Meanwhile, prefetch AHEAD
// rows, `step` bytes at a time.
template <class Kind, int AHEAD, int... M, int... N, int... V>
APART void multiply_tile(Strided<typename Kind::Weight> w, Strided<typename Kind::X> x, int64_t depth, float *totals, bool add,
                         Strided<uint8_t> next, int64_t step, Numbers<M...>, Numbers<N...> columns, Numbers<V...>) {
    Sums sum = {};
    const auto add_step = [&](int64_t i) INLINE_LAMBDA {
        const typename Kind::Values weights[] = {Kind::values(w.from(N).first + i)...};
        (add_row<Kind, M>(sum, weights, x.from(M).first + i, columns), ...);
    };
    int64_t i = 0, ahead = 0;
    for (int64_t end = STEPS * step; i + STEPS * Kind::STEP <= depth; i += STEPS * Kind::STEP, end += STEPS * step) {
        if constexpr (AHEAD > 0) {
            for (; ahead < end; ahead += LINE)
                for (int k = 0; k < AHEAD; ++k) __builtin_prefetch(next.from(k).first + ahead, 0, 2);
        }
        UNROLLED
        for (int k = 0; k < STEPS; ++k) add_step(i + k * Kind::STEP);
    }
    for (; i < depth; i += Kind::STEP) add_step(i);
    const auto lanes = std::make_integer_sequence<int, LANES>();
    const Vec found[] = {total<V>(sum, lanes)...};
    for (int v = 0; v < SUM_VECTORS; ++v, totals += LANES) store(totals, add ? load(totals) + found[v] : found[v]);
}

// `steps` steps of a tile with values that stay in registers.
template <class Kind, int... N>
APART Vec repeat_tile(const typename Kind::X *from, int64_t steps, Numbers<N...>) {
    Sums sum = {splat((float)N)...};  // equal ones would be computed once
    const typename Kind::Values values = Kind::values(from);
    for (int64_t i = 0; i < steps; ++i) ((sum[N] = Kind::add(sum[N], values, values)), ...);
    return (sum[N] + ...);
}

template <class Kind, int AHEAD>
TARGET void multiply_tile(Strided<typename Kind::Weight> w, Strided<typename Kind::X> x, int64_t depth, float *totals, bool add,
                          Strided<uint8_t> next, int64_t step) {
    multiply_tile<Kind, AHEAD>(w, x, depth, totals, add, next, step, std::make_integer_sequence<int, TILE_X>(),
                               std::make_integer_sequence<int, TILE_WEIGHTS>(),
                               std::make_integer_sequence<int, SUM_VECTORS>());
}

// Up to BAND_ROWS rows of W, from row `begin`. DIRECT: they are in the matrix. Then a tile that would not be complete begins
// earlier, and some rows are multiplied twice, because memory beyond the matrix must not be read. T: the type of y.
template <class Kind, bool DIRECT, class T>
struct Band {
    const PackedLinear &job;
    int64_t begin, count, depth;  // depth: values of each row
    bool first, last;  // depth
    Strided<typename Kind::Weight> rows;
    Strided<uint8_t> next;  // `next_count` rows to prefetch
    int64_t next_count;

    int64_t tiles() const { return (count + TILE_WEIGHTS - 1) / TILE_WEIGHTS; }
    int64_t place(int64_t tile) const {
        const int64_t row = tile * TILE_WEIGHTS;
        return DIRECT ? std::min<int64_t>(row, count - TILE_WEIGHTS) : row;
    }

    // Multiply with the n-th tile of rows of x, of `x_tiles` tiles. All of them together prefetch the next rows.
    TARGET void multiply(Strided<typename Kind::X> x, int64_t n, int64_t x_tiles, float *totals) const {
        const int64_t all = x_tiles * tiles(), step = Kind::STEP * job.bits / 8;
        if (last) prefetch_outputs(n * TILE_X);
        for (int64_t tile = 0, at = n * tiles(); tile < tiles(); ++tile, ++at, totals += TILE_TOTALS) {
            const int64_t begun = at * next_count / all, share = (at + 1) * next_count / all - begun;
            const auto w = rows.from(place(tile));
            const auto own = next.from(begun);
            if (share == 0) multiply_tile<Kind, 0>(w, x, depth, totals, !first, own, step);
            else if (share == 1) multiply_tile<Kind, 1>(w, x, depth, totals, !first, own, step);
            else if (share == 2) multiply_tile<Kind, 2>(w, x, depth, totals, !first, own, step);
            else if (share == 3) multiply_tile<Kind, 3>(w, x, depth, totals, !first, own, step);
            else multiply_tile<Kind, TILE_WEIGHTS>(w, x, depth, totals, !first, own, step);
            if (last) write(n * TILE_X, tile, totals);
        }
    }

private:
    T *output(int64_t m, int64_t row) const { return (T *)job.y + m * job.out + begin + row; }

    void prefetch_outputs(int64_t m) const {
        for (int64_t end = std::min(m + TILE_X, job.rows); m < end; ++m)
            for (int64_t at = 0; at < count; at += LINE / sizeof(T)) __builtin_prefetch(output(m, at), 1);
    }

    // Write the totals of a tile with TILE_X rows of x from row `m`.
    INLINE void write(int64_t m, int64_t tile, const float *totals) const {
        const int64_t from = tile * TILE_WEIGHTS, skipped = from - place(tile);
        const int64_t left = std::min<int64_t>(TILE_WEIGHTS, count - from);
        float biased[TILE_TOTALS];
        if (job.bias) {
            float bias[TILE_WEIGHTS] = {};
            widen(job.type, job.bias, begin + from, bias + skipped, left);
            for (int i = 0; i < TILE_SUMS; ++i) biased[i] = totals[i] + bias[i % TILE_WEIGHTS];
            totals = biased;
        }
        T found[TILE_TOTALS];
        for (int v = 0; v < SUM_VECTORS; ++v) store(found + v * LANES, load(totals + v * LANES));
        for (int64_t k = 0; k < std::min<int64_t>(TILE_X, job.rows - m); ++k) {
            const T *some = found + k * TILE_WEIGHTS + skipped;
            if (left == TILE_WEIGHTS) memcpy(output(m + k, from), some, TILE_WEIGHTS * sizeof(T));  // of constant size
            else memcpy(output(m + k, from), some, left * sizeof(T));
        }
    }
};

// Multiply rows `begin` to `end` of W with all rows of x. DIRECT: read W in its place, otherwise in pieces that are first
// converted to the type of x. T: the type of y.
template <class Kind, bool DIRECT, class T>
TARGET void multiply_bands(const PackedLinear &job, int64_t begin, int64_t end) {
    typedef typename Kind::X X;
    const Operand<X> operand(job);
    const int64_t filled = DIRECT ? 0 : BAND_ROWS * operand.pitch * sizeof(X) / sizeof(float);
    const int64_t kept = operand.depths > 1 ? BAND_TOTALS : 0;  // for each tile of x, until all depths are added
    static thread_local std::vector<float> room;
    float *totals = aligned(room, filled + BAND_TOTALS + kept * operand.tiles) + filled;
    X *pieces = (X *)(totals - filled);
    const int64_t tiles = (end - begin + TILE_WEIGHTS - 1) / TILE_WEIGHTS, bands = (tiles + BAND_TILES - 1) / BAND_TILES;
    const int64_t row_bytes = job.in * job.bits / 8;
    for (int64_t b = 0, n = begin, next_n; b < bands; ++b, n = next_n) {
        next_n = std::min(begin + tiles * (b + 1) / bands * TILE_WEIGHTS, end);
        for (int64_t d = 0; d < operand.depths; ++d) {
            const int64_t at = d * operand.depth, depth = std::min(operand.depth, job.in - at);
            Band<Kind, DIRECT, T> band = {job, n, next_n - n, whole(depth, Kind::STEP), d == 0, d + 1 == operand.depths};
            if constexpr (DIRECT) {
                band.rows = {(const typename Kind::Weight *)job.packed + n * job.in + at, job.in};
            } else {
                for (int64_t k = 0; k < band.count; ++k) fill(job, n + k, at, depth, pieces + k * operand.pitch);
                band.rows = {pieces, operand.pitch};
            }
            // After the last depth, the next band of the thread often follows.
            const int64_t next_row = band.last ? next_n : n, next_at = band.last ? 0 : at + operand.depth;
            band.next = {job.packed + next_row * row_bytes + next_at * job.bits / 8, row_bytes};
            band.next_count = std::min<int64_t>(band.last ? BAND_ROWS : band.count, job.out - next_row);
            const X *x = (const X *)job.operand;
            for (int64_t t = 0; t < operand.tiles; ++t)
                band.multiply({x + operand.place(d, t * TILE_X), operand.pitch}, t, operand.tiles, totals + t * kept);
        }
    }
}

template <class Kind, bool DIRECT>
TARGET void multiply_all(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return multiply_bands<Kind, DIRECT, float>(job, begin, end);
    if (job.type == Type::bfloat16) return multiply_bands<Kind, DIRECT, Bf16>(job, begin, end);
    multiply_bands<Kind, DIRECT, Half>(job, begin, end);
}

TARGET inline void multiply_tiled(const PackedLinear &job, int64_t begin, int64_t end) {
    const bool complete = job.out >= TILE_WEIGHTS;
#ifdef FLEXGEN_DOT_BF16
    if (by_pairs(job)) {
        if (complete && job.in % Paired::STEP == 0) return multiply_all<Paired, true>(job, begin, end);
        return multiply_all<Paired, false>(job, begin, end);
    }
#endif
    if (!complete || job.rows > WIDENED_IN_TILES || job.bits != 16 || job.in % LANES)
        return multiply_all<Widened<float>, false>(job, begin, end);
    if (job.scale_type == Type::bfloat16) return multiply_all<Widened<Bf16>, true>(job, begin, end);
    multiply_all<Widened<Half>, true>(job, begin, end);
}

template <class X>
void prepare_operand(PackedLinear &job) {
    const Operand<X> operand(job);
    job.operand = aligned(job.wide, operand.size() * sizeof(X) / sizeof(float));
    job.parts = operand.tiles;
}
TARGET inline void prepare_tiled(PackedLinear &job) {
    job.tiled = true;
    job.block = BAND_ROWS;
    job.piece = 4 * BAND_ROWS;
    by_pairs(job) ? prepare_operand<Bf16>(job) : prepare_operand<float>(job);
}

INLINE void copy_row(const PackedLinear &job, int64_t at, Bf16 *to, int64_t count) {
    memcpy(to, (const Bf16 *)job.x + at, count * sizeof(Bf16));
}
INLINE void copy_row(const PackedLinear &job, int64_t at, float *to, int64_t count) { widen(job.type, job.x, at, to, count); }

// Copy some tiles of x, with zeros where a tile reads beyond a row or the last row.
template <class X>
TARGET void order_operand(const PackedLinear &job, int64_t first, int64_t last) {
    const Operand<X> operand(job);
    for (int64_t d = 0; d < operand.depths; ++d) {
        const int64_t at = d * operand.depth, depth = std::min(operand.depth, job.in - at);
        for (int64_t m = first * TILE_X; m < last * TILE_X; ++m) {
            X *to = (X *)job.operand + operand.place(d, m);
            const int64_t count = m < job.rows ? depth : 0;
            if (count) copy_row(job, m * job.in + at, to, count);
            std::fill(to + count, to + operand.pitch, X{0});
        }
    }
}
TARGET inline void order_tiled(const PackedLinear &job, int64_t first, int64_t last) {
    by_pairs(job) ? order_operand<Bf16>(job, first, last) : order_operand<float>(job, first, last);
}

#ifdef FLEXGEN_DOT_BF16
typedef Paired Fastest;
#else
typedef Widened<float> Fastest;
#endif
// See `Variant`.
TARGET int64_t multiply_registers(int64_t steps) {
    typename Fastest::X zeros[Fastest::STEP] = {};
    float totals[LANES];
    store(totals, repeat_tile<Fastest>(zeros, steps, std::make_integer_sequence<int, TILE_SUMS>()));
    return totals[0] > 0.0f ? 2 * Fastest::STEP * TILE_SUMS * steps : 0;
}

}  // namespace linear
}  // namespace VARIANT
