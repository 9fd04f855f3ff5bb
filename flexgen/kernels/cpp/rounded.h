// Products of group-wise integers with x rounded to int8, for AVX2 (rounded_codes.h).
//
// One row of x: a row of W after the other, each read from beginning to end. More rows: a panel of 16 rows of W is unpacked
// to the L1 cache, RUN groups at a time, and multiplied with blocks of up to BLOCK rows of x. Each lane of a vector is a row
// of W, so sums need no shuffles, and the scales of the rows are vectors too.
#pragma once

#include "rounded_codes.h"

namespace VARIANT {
namespace bytes {

using linear::Method;
using linear::method_of;
using linear::padded;

constexpr int64_t STRIP = LANES, PANEL = 2 * STRIP;  // rows of W
constexpr int64_t RUN = LANES;  // groups of a panel that are unpacked at once
constexpr int64_t BLOCK = 4;  // rows of x whose sums with a panel fit in registers

INLINE __m256i splat_dword(const uint32_t *from) { return _mm256_set1_epi32((int)*from); }
// A value that is used several times. Compilers would load it from memory for each use.
INLINE __m256i kept(__m256i x) {
    asm("" : "+x"(x));
    return x;
}

// ---- One row of x ----

constexpr int64_t AHEAD = 2048;  // bytes from codes to those that are prefetched

// x: the steps of each group. `x_scales` and `sums`: of each group, padded with zeros.
template <class Kind>
TARGET void prepare_row(PackedLinear &job) {
    const int64_t groups = job.groups(), steps = groups * Kind::STEPS, width = padded(groups);
    float *room = aligned(job.wide, steps + 2 * width), *scales = room + steps, *sums = scales + width;
    std::fill_n(scales, 2 * width, 0.0f);
    Ordered<Kind> group;
    for (int64_t g = 0; g < groups; ++g) {
        round_group(job, 0, g, group);
        memcpy(room + g * Kind::STEPS, group.steps, sizeof group.steps);
        scales[g] = group.scale;
        sums[g] = group.sum;
    }
    job.operand = room;
    job.x_scales = scales;
    job.sums = sums;
}

// The integer products of a group, in eight parts.
template <class Kind>
INLINE Vec group_products(const uint8_t *codes, const __m256i *x) {
    constexpr int64_t VECTORS = code_vectors<Kind>;
    __m256i sum = zeros();
    UNROLLED
    for (int64_t v = 0; v < VECTORS; ++v) {
        __m256i first, second;
        Kind::unpack(load_codes(codes + v * sizeof(__m256i)), first, second);
        sum = Kind::sum(sum, Kind::sum(Kind::product(first, x[v]), Kind::product(second, x[VECTORS + v])));
    }
    return (Vec)_mm256_cvtepi32_ps(Kind::widened(sum));
}

template <class Kind, class S>
INLINE Vec row_products(const PackedLinear &job, int64_t n) {
    constexpr int64_t BYTES = group_bytes<Kind>;
    const int64_t groups = job.groups();
    const uint8_t *codes = job.packed + n * groups * BYTES;
    const S *scales = (const S *)job.scales + n * groups, *minimums = (const S *)job.minimums + n * groups;
    const __m256i *x = (const __m256i *)job.operand;
    Vec products[2] = {}, shifts = {};
    for (int64_t g = 0; g < groups; g += LANES) {
        const int64_t count = std::min<int64_t>(LANES, groups - g);
        const bool whole = count == LANES;
        shifts = fma(whole ? load(minimums + g) : load_part(minimums + g, count), load(job.sums + g), shifts);
        float factors[LANES];
        store(factors, (whole ? load(scales + g) : load_part(scales + g, count)) * load(job.x_scales + g));
        const auto add = [&](int64_t i) INLINE_LAMBDA {
            const Vec some = group_products<Kind>(codes + i * BYTES, x + i * Kind::STEPS / LANES);
            products[i % 2] = fma(some, splat(factors[i]), products[i % 2]);
        };
        if (whole) {
            UNROLLED
            for (int64_t at = 0; at < LANES * BYTES; at += LINE) __builtin_prefetch(codes + at + AHEAD, 0, 2);
            UNROLLED
            for (int64_t i = 0; i < LANES; ++i) add(i);
        } else {
            for (int64_t i = 0; i < count; ++i) add(i);
        }
        codes += LANES * BYTES;
        x += LANES * Kind::STEPS / LANES;
    }
    return products[0] + products[1] + shifts;
}

template <class Kind, class S>
TARGET void multiply_row(const PackedLinear &job, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - n);
        Vec parts[LANES] = {};
        for (int64_t k = 0; k < count; ++k) parts[k] = row_products<Kind, S>(job, n + k);
        write_outputs(job, sums(parts), 0, n, count);
    }
}

// ---- Several rows of x ----

inline int64_t blocks_of(const PackedLinear &job) { return (job.rows + BLOCK - 1) / BLOCK; }
// The first row of a block of x. Blocks differ by one row at most.
inline int64_t block_begin(const PackedLinear &job, int64_t block, int64_t blocks) { return job.rows * block / blocks; }

// For each run of groups and block of x: the steps (groups, STEPS, rows), and in `sums` and `x_scales` (groups, rows). So
// the products of a panel read consecutive memory.
template <class Kind>
TARGET void prepare_blocks(PackedLinear &job) {
    const int64_t count = job.rows * job.groups();
    float *room = aligned(job.wide, count * (Kind::STEPS + 2));
    job.operand = room;
    job.sums = room + count * Kind::STEPS;
    job.x_scales = job.sums + count;
    job.parts = blocks_of(job);
    job.tiled = true;
    job.block = PANEL;
    job.piece = 8 * PANEL;
}

// The place of the first group of a run and of row `m` of x, of which a block begins with row `m`.
inline int64_t place_of(const PackedLinear &job, int64_t g, int64_t m) {
    return g * job.rows + m * std::min(RUN, job.groups() - g);
}

template <class Kind>
TARGET void order_blocks(const PackedLinear &job, int64_t first, int64_t last) {
    const int64_t groups = job.groups(), blocks = blocks_of(job);
    Ordered<Kind> group;
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block_begin(job, block, blocks), rows = block_begin(job, block + 1, blocks) - begin;
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t place = place_of(job, g / RUN * RUN, begin) + g % RUN * rows;
                uint32_t *to = (uint32_t *)job.operand + place * Kind::STEPS + m;
                round_group(job, begin + m, g, group);
                for (int64_t step = 0; step < Kind::STEPS; ++step) to[step * rows] = group.steps[step];
                ((float *)job.sums)[place + m] = group.sum;
                ((float *)job.x_scales)[place + m] = group.scale;
            }
    }
}

// The lines of the next run of a panel. Each step of the work prefetches `each` of them: all at once, they would wait for the
// memory.
template <class Kind>
struct Ahead {
    static constexpr int64_t LINES = RUN * group_bytes<Kind> / LINE;  // of a row
    const uint8_t *const *rows;
    int64_t offset, each;  // offset: bytes from each row
    int64_t at = 0;  // the number of the next line

    INLINE void fetch() {
        for (const int64_t end = std::min(at + each, PANEL * LINES); at < end; ++at)
            __builtin_prefetch(rows[at / LINES] + offset + at % LINES * LINE, 0, 2);
    }
};

// Groups `first` to `first` + `count` of the rows of a panel. Beyond the matrix, its last row is repeated.
template <class Kind>
struct Panel {
    alignas(LINE) __m256i codes[RUN][Kind::STEPS][2];
    alignas(LINE) float scales[RUN][PANEL], minimums[RUN][PANEL];
    const uint8_t *rows[PANEL];
    int64_t places[PANEL];  // of the scales of the rows

    TARGET void begin(const PackedLinear &job, int64_t n, int64_t count) {
        for (int64_t k = 0; k < PANEL; ++k) {
            const int64_t row = n + std::min(k, count - 1);
            places[k] = row * job.groups();
            rows[k] = job.packed + places[k] * group_bytes<Kind>;
        }
    }

    TARGET void unpack(int64_t first, int64_t count, int64_t strip, Ahead<Kind> &ahead) {
        constexpr int64_t VECTORS = code_vectors<Kind>, SIZE = sizeof(__m256i);
        for (int64_t g = 0; g < count; ++g) {
            ahead.fetch();
            for (int64_t v = 0; v < VECTORS; ++v) {
                __m256i dwords[LANES];
                UNROLLED
                for (int64_t k = 0; k < STRIP; ++k)
                    dwords[k] = load_codes(rows[strip * STRIP + k] + (first + g) * group_bytes<Kind> + v * SIZE);
                transpose(dwords);
                UNROLLED
                for (int64_t i = 0; i < LANES; ++i) {
                    const int64_t step = v * LANES + i;
                    Kind::unpack(dwords[i], codes[g][step][strip], codes[g][Kind::STEPS / 2 + step][strip]);
                }
            }
        }
    }

    template <class S>
    TARGET void widen_scales(const void *from, int64_t first, int64_t count, int64_t strip, float (&to)[RUN][PANEL]) {
        __m256i lanes[LANES];
        UNROLLED
        for (int64_t k = 0; k < STRIP; ++k) {
            const S *some = (const S *)from + places[strip * STRIP + k] + first;
            lanes[k] = (__m256i)(count == RUN ? load(some) : load_part(some, count));
        }
        transpose(lanes);
        UNROLLED
        for (int64_t g = 0; g < RUN; ++g) store(to[g] + strip * STRIP, (Vec)lanes[g]);
    }

    template <class S>
    TARGET void fill(const PackedLinear &job, int64_t first, int64_t count, Ahead<Kind> &ahead) {
        for (int64_t strip = 0; strip < 2; ++strip) {
            unpack(first, count, strip, ahead);
            widen_scales<S>(job.scales, first, count, strip, scales);
            widen_scales<S>(job.minimums, first, count, strip, minimums);
        }
    }
};

// Add the products of AT_ONCE steps of a panel and X rows of x.
template <class Kind, int X>
INLINE void add_steps(const __m256i (*codes)[2], const uint32_t *x, __m256i (&sum)[X][2]) {
    UNROLLED
    for (int64_t step = 0; step < AT_ONCE; ++step) {
        const __m256i first = kept(codes[step][0]), second = kept(codes[step][1]);
        UNROLLED
        for (int m = 0; m < X; ++m) {
            const __m256i values = splat_dword(x + step * X + m);
            Kind::add(sum[m][0], Kind::product(first, values));
            Kind::add(sum[m][1], Kind::product(second, values));
        }
    }
}

// The integer products of a group. Short sums are widened before they could overflow.
template <class Kind, int X>
INLINE void group_products(const __m256i (*codes)[2], const uint32_t *x, __m256i (&whole)[X][2]) {
    UNROLLED
    for (int m = 0; m < X; ++m) whole[m][0] = whole[m][1] = zeros();
    for (int64_t step = 0; step < Kind::STEPS; step += AT_ONCE) {
        if constexpr (Kind::SHORT) {
            __m256i sum[X][2];
            UNROLLED
            for (int m = 0; m < X; ++m) sum[m][0] = sum[m][1] = zeros();
            add_steps<Kind, X>(codes + step, x + step * X, sum);
            UNROLLED
            for (int m = 0; m < X; ++m)
                for (int strip = 0; strip < 2; ++strip)
                    whole[m][strip] = _mm256_add_epi32(whole[m][strip], Kind::widened(sum[m][strip]));
        } else {
            add_steps<Kind, X>(codes + step, x + step * X, whole);
        }
    }
}

// Rows of a block of x in a run of `groups` groups, and their sums and scales.
struct Rows {
    const uint32_t *steps;
    const float *sums, *scales;
    int64_t groups;
};

// Add the products of a panel and X rows of x to `totals` (X, PANEL).
template <class Kind, int X>
APART void add_panel(const Panel<Kind> &panel, Rows x, float *totals, Ahead<Kind> &ahead) {
    for (int64_t g = 0; g < x.groups; ++g, x.steps += Kind::STEPS * X, x.sums += X, x.scales += X) {
        ahead.fetch();
        __m256i whole[X][2];
        group_products<Kind, X>(panel.codes[g], x.steps, whole);
        UNROLLED
        for (int strip = 0; strip < 2; ++strip) {
            const Vec scale = load(panel.scales[g] + strip * STRIP), minimum = load(panel.minimums[g] + strip * STRIP);
            UNROLLED
            for (int m = 0; m < X; ++m) {
                float *to = totals + m * PANEL + strip * STRIP;
                const Vec total = fma(minimum, splat(x.sums[m]), load(to));
                store(to, fma((Vec)_mm256_cvtepi32_ps(whole[m][strip]), scale * splat(x.scales[m]), total));
            }
        }
    }
}

template <class Kind, int X = BLOCK>
INLINE void add_rows(const Panel<Kind> &panel, Rows x, int64_t rows, float *totals, Ahead<Kind> &ahead) {
    if (rows == X) return add_panel<Kind, X>(panel, x, totals, ahead);
    if constexpr (X > 1) add_rows<Kind, X - 1>(panel, x, rows, totals, ahead);
}

template <class Kind, class S>
TARGET void multiply_panels(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t BYTES = group_bytes<Kind>;
    const int64_t groups = job.groups(), blocks = blocks_of(job);
    const int64_t steps = RUN * (2 + blocks);  // that prefetch: the groups of both strips, and of each block of x
    const int64_t each = (PANEL * Ahead<Kind>::LINES + steps - 1) / steps;
    static thread_local std::vector<float> room;
    float *totals = aligned(room, job.rows * PANEL);
    Panel<Kind> panel;
    for (int64_t n = begin; n < end; n += PANEL) {
        const int64_t rows = std::min(PANEL, end - n);
        panel.begin(job, n, rows);
        std::fill_n(totals, job.rows * PANEL, 0.0f);
        for (int64_t g = 0; g < groups; g += RUN) {
            const int64_t count = std::min(RUN, groups - g);
            // The next run, or the first one of the next panel.
            Ahead<Kind> ahead{panel.rows, (g + RUN < groups ? g + RUN : PANEL * groups) * BYTES, each};
            panel.template fill<S>(job, g, count, ahead);
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t m = block_begin(job, block, blocks), place = place_of(job, g, m);
                const Rows x{(const uint32_t *)job.operand + place * Kind::STEPS, job.sums + place, job.x_scales + place, count};
                add_rows(panel, x, block_begin(job, block + 1, blocks) - m, totals + m * PANEL, ahead);
            }
        }
        for (int64_t m = 0; m < job.rows; ++m)
            for (int64_t at = 0; at < rows; at += STRIP)
                write_outputs(job, load(totals + m * PANEL + at), m, n + at, std::min(STRIP, rows - at));
    }
}

// ---- All products ----

template <class Kind>
TARGET void prepare_as(PackedLinear &job) {
    if (method_of(job) == Method::lines) return prepare_row<Kind>(job);
    prepare_blocks<Kind>(job);
}
TARGET inline void prepare(PackedLinear &job) {
    job.block = STRIP;
    job.bits == 4 ? prepare_as<Nibbles>(job) : prepare_as<Octets>(job);
}

TARGET inline void order(const PackedLinear &job, int64_t first, int64_t last) {
    job.bits == 4 ? order_blocks<Nibbles>(job, first, last) : order_blocks<Octets>(job, first, last);
}

template <class Kind, class S>
TARGET void multiply_as(const PackedLinear &job, int64_t begin, int64_t end) {
    if (method_of(job) == Method::lines) return multiply_row<Kind, S>(job, begin, end);
    multiply_panels<Kind, S>(job, begin, end);
}
template <class Kind>
TARGET void multiply_with(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.scale_type == Type::bfloat16) return multiply_as<Kind, Bf16>(job, begin, end);
    multiply_as<Kind, Half>(job, begin, end);
}
TARGET inline void multiply(const PackedLinear &job, int64_t begin, int64_t end) {
    job.bits == 4 ? multiply_with<Nibbles>(job, begin, end) : multiply_with<Octets>(job, begin, end);
}

}  // namespace bytes
}  // namespace VARIANT
