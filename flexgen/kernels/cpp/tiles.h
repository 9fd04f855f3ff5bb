// Products with many rows of x, which are limited by arithmetic and not by reading W.
//
// A tile is WEIGHTS rows of W times X rows of x, with its sums in registers. Both are widened to float32 once: x at the
// beginning, and W in registers if few tiles share it, otherwise into a buffer that stays in the L1 cache. DEPTH values
// of each row are multiplied before the next DEPTH values, so that the shared data of all tiles stays in the L2 cache
// together with the pending sums (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008;
// here lanes run along the values, because both matrices are row-major).
#pragma once

#include <type_traits>
#include <utility>

namespace VARIANT {
namespace linear {

constexpr int TILE_X = 4;
constexpr int TILE_WEIGHTS = SUM_REGISTERS == 16 ? 6 : 3;  // with these and one row of x, all registers are in use
constexpr int64_t DEPTH = 1024;
constexpr int64_t AT_ONCE = 64;  // rows of x that are multiplied with the same rows of W
constexpr int64_t FEW = 16;  // up to this many rows of x, a half type is widened in registers

inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// The values that are multiplied at a time: whole groups of W.
inline int64_t depth_of(const PackedLinear &job) {
    return job.bits == 16 ? DEPTH : std::max<int64_t>(DEPTH / job.group, 1) * job.group;
}

// The distance between rows in floats. It is not a power of two, so that rows do not share cache sets.
inline int64_t pitch_of(int64_t values) { return whole(values, LANES) + LANES; }

// The floats of a row of x in the layout of `prepare_tiled`.
inline int64_t row_floats(const PackedLinear &job) {
    const int64_t most = depth_of(job);
    return whole(job.in, LANES) + (job.in + most - 1) / most * LANES;
}

inline int64_t rows_at_once(const PackedLinear &job) {
    const int64_t blocks = (job.rows + AT_ONCE - 1) / AT_ONCE;
    return whole((job.rows + blocks - 1) / blocks, TILE_X);
}

// Widen values `from` to `from` + `count` of a row of W, with zeros up to a whole vector.
template <class W>
TARGET void fill_plain(const PackedLinear &job, int64_t row, int64_t from, int64_t count, float *to) {
    std::fill(to + count, to + whole(count, LANES), 0.0f);
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

typedef void (*Fill)(const PackedLinear &, int64_t, int64_t, int64_t, float *);

inline Fill fill_of(const PackedLinear &job) {
    if (job.bits != 16) return job.bits == 4 ? fill_packed<4> : fill_packed<8>;
    return job.scale_type == Type::bfloat16 ? fill_plain<Bf16> : fill_plain<Half>;
}

// The addresses of the next rows of W, and the bytes of LANES values.
struct Next {
    const uint8_t *rows[TILE_WEIGHTS];
    int64_t step;
};

template <int... N>
using Numbers = std::integer_sequence<int, N...>;
typedef Vec Sums[TILE_X][TILE_WEIGHTS];

// Row `M` of a tile with columns `N`. All indices are constants, so that compilers keep the sums in registers.
template <int M, int... N>
INLINE void take_sums(Sums &sum, const float *from, int64_t stride, Numbers<N...>) {
    ((sum[M][N] = load(from + (N * stride + M) * LANES)), ...);
}
template <int M, int... N>
INLINE void give_sums(const Sums &sum, float *to, int64_t stride, Numbers<N...>) {
    (store(to + (N * stride + M) * LANES, sum[M][N]), ...);
}
template <int M, int... N>
INLINE void add_row(Sums &sum, const Vec (&weights)[TILE_WEIGHTS], const float *x, Numbers<N...>) {
    const Vec values = load(x);
    ((sum[M][N] = fma(weights[N], values, sum[M][N])), ...);
}

// Add the products of `depth` values of the rows of w with rows of x to `sums` (TILE_WEIGHTS, stride) vectors.
template <bool FIRST, bool PREFETCH, class W, int... M, int... N>
TARGET void add_tile(const W *const (&w)[TILE_WEIGHTS], const float *x, int64_t depth, float *sums, int64_t stride,
                     const Next &next, Numbers<M...>, Numbers<N...> columns) {
    const int64_t pitch = pitch_of(depth);
    Sums sum = {};
    if (!FIRST) (take_sums<M>(sum, sums, stride, columns), ...);
    for (int64_t i = 0; i < depth; i += LANES) {
        const Vec weights[] = {load(w[N] + i)...};
        const int64_t at = i / LANES * next.step;
        if (PREFETCH && at % LINE < next.step) (__builtin_prefetch(next.rows[N] + at), ...);
        (add_row<M>(sum, weights, x + M * pitch + i, columns), ...);
    }
    (give_sums<M>(sum, sums, stride, columns), ...);
}

// The same for `stride` rows of x. The next rows of W are prefetched during the first of them.
template <bool FIRST, class W>
TARGET void add_tiles(const W *const (&w)[TILE_WEIGHTS], const float *x, int64_t depth, float *sums, int64_t stride,
                      const Next &next) {
    const auto rows = std::make_integer_sequence<int, TILE_X>();
    const auto columns = std::make_integer_sequence<int, TILE_WEIGHTS>();
    add_tile<FIRST, true>(w, x, depth, sums, stride, next, rows, columns);
    for (int64_t i = TILE_X; i < stride; i += TILE_X)
        add_tile<FIRST, false>(w, x + i * pitch_of(depth), depth, sums + i * LANES, stride, next, rows, columns);
}

template <class T>
TARGET void write_row(const PackedLinear &job, const float *sums, int64_t m, int64_t rows, int64_t n) {
    float bias = 0.0f;
    if (job.bias) widen(job.type, job.bias, n, &bias, 1);
    for (int64_t i = 0; i < rows; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, rows - i);
        Vec some[LANES];
        for (int64_t k = 0; k < LANES; ++k) some[k] = k < count ? load(sums + (i + k) * LANES) : Vec{};
        T totals[LANES];
        store(totals, VARIANT::sums(some) + splat(bias));
        for (int64_t k = 0; k < count; ++k) ((T *)job.y)[(m + i + k) * job.out + n] = totals[k];
    }
}

// Multiply rows `begin` to `end` of W with `rows` rows of x, starting at row `m`. `wide`: a buffer for W in float32.
template <class W>
TARGET void multiply_at_once(const PackedLinear &job, int64_t begin, int64_t end, int64_t m, int64_t rows, float *wide,
                             float *sums) {
    const Fill fill = fill_of(job);
    const int64_t most = depth_of(job), stride = whole(rows, TILE_X);
    const float *x = (const float *)job.operand + m * row_floats(job);
    for (int64_t at = 0; at < job.in; at += most) {
        const int64_t count = std::min(most, job.in - at), depth = whole(count, LANES);
        for (int64_t n = begin; n < end; n += TILE_WEIGHTS) {
            const bool last = n + TILE_WEIGHTS >= end;
            const int64_t next_row = last ? begin : n + TILE_WEIGHTS;
            const int64_t next_at = last ? std::min(at + most, job.in - 1) : at;
            const W *w[TILE_WEIGHTS];
            Next next;
            next.step = LANES * job.bits / 8;
            for (int k = 0; k < TILE_WEIGHTS; ++k) {
                const int64_t row = std::min(n + k, end - 1);  // memory beyond the last row must not be read
                if constexpr (std::is_same<W, float>::value) {
                    fill(job, row, at, count, wide + k * pitch_of(most));
                    w[k] = wide + k * pitch_of(most);
                } else {
                    w[k] = (const W *)job.packed + row * job.in + at;
                }
                next.rows[k] = job.packed + (std::min(next_row + k, end - 1) * job.in + next_at) * job.bits / 8;
            }
            float *to = sums + (n - begin) * stride * LANES;
            at ? add_tiles<false>(w, x, depth, to, stride, next) : add_tiles<true>(w, x, depth, to, stride, next);
        }
        x += stride * pitch_of(count);
    }
    for (int64_t n = begin; n < end; ++n, sums += stride * LANES) {
        if (job.type == Type::float32) write_row<float>(job, sums, m, rows, n);
        if (job.type == Type::bfloat16) write_row<Bf16>(job, sums, m, rows, n);
        if (job.type == Type::float16) write_row<Half>(job, sums, m, rows, n);
    }
}

TARGET inline void multiply_tiled(const PackedLinear &job, int64_t begin, int64_t end) {
    static thread_local std::vector<float> room;
    const int64_t each = rows_at_once(job), widened = TILE_WEIGHTS * pitch_of(depth_of(job));
    float *wide = aligned(room, widened + whole(end - begin, TILE_WEIGHTS) * each * LANES), *sums = wide + widened;
    const bool in_registers = job.rows <= FEW && job.bits == 16 && job.in % LANES == 0;
    for (int64_t m = 0; m < job.rows; m += each) {
        const int64_t rows = std::min(each, job.rows - m);
        if (!in_registers) multiply_at_once<float>(job, begin, end, m, rows, wide, sums);
        else if (job.scale_type == Type::bfloat16) multiply_at_once<Bf16>(job, begin, end, m, rows, wide, sums);
        else multiply_at_once<Half>(job, begin, end, m, rows, wide, sums);
    }
}

// Convert x to float32 in the layout of tiles: some values of each of `rows_at_once` rows follow one another, with
// zeros where a tile reads beyond them.
TARGET inline void prepare_tiled(PackedLinear &job) {
    const int64_t each = rows_at_once(job), most = depth_of(job);
    float *to = aligned(job.wide, whole(job.rows, TILE_X) * row_floats(job));
    job.operand = to;
    for (int64_t m = 0; m < job.rows; m += each) {
        const int64_t end = std::min(m + each, whole(job.rows, TILE_X));
        for (int64_t at = 0; at < job.in; at += most) {
            const int64_t count = std::min(most, job.in - at);
            for (int64_t row = m; row < end; ++row, to += pitch_of(count)) {
                const int64_t there = row < job.rows ? count : 0;
                if (there) widen(job.type, job.x, row * job.in + at, to, there);
                std::fill(to + there, to + pitch_of(count), 0.0f);
            }
        }
    }
}

}  // namespace linear
}  // namespace VARIANT
