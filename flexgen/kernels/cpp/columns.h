// Products with W in words of several codes whose neighbours belong to other rows of W (GPTQ and AWQ), read in place.
// The lanes of a sum are rows of W, and each value of x meets all of them.
//
// A strip is the rows of W whose sums are in registers for the values of a group. Codes count from the middle of their
// range, so with the zero point z, the sum of a group is  scale * (codes . x - (z - middle) * sum(x)).
#pragma once

namespace VARIANT {
namespace encoded {

using linear::aligned;
using linear::MAX_X;
using linear::whole;
using linear::widen;

static_assert(ENCODED_BLOCK % (8 * LANES) == 0, "a word of AWQ has values of eight rows");

template <int BITS>
constexpr int MIDDLE = 1 << (BITS - 1);

// The values of the codes of four bits.
alignas(64) constexpr float INTEGERS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) constexpr float E2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// The value of the code in the last bits of each word.
template <int BITS>
INLINE Vec integer(Words words) {
    if constexpr (BITS == 4) return lookup(INTEGERS, words);
    return to_float(words & 255) - (float)MIDDLE<8>;
}

inline int64_t groups_of(const PackedLinear &job) { return (job.in + job.group - 1) / job.group; }

// GPTQ: words (in / EACH, out) with consecutive values of a row of W, zero points (groups, out / EACH).
template <int BITS_>
struct Down {
    static constexpr int BITS = BITS_, EACH = 32 / BITS;
    static constexpr int64_t ROWS = EACH;  // values of x for a row of words
    template <int X>
    static constexpr int vectors = SUM_REGISTERS / X < SUM_REGISTERS / 2 ? SUM_REGISTERS / X : SUM_REGISTERS / 2;
    template <int X>
    static constexpr int64_t strip_words = vectors<X> * LANES;
    template <int X>
    static constexpr int64_t strip = vectors<X> * LANES;  // rows of W

    static int64_t words(const PackedLinear &job) { return job.out; }  // in a row of them
    static int64_t word_of(int64_t row) { return row; }
    static int shift(int64_t row) { return (int)(row % EACH * BITS); }  // of the zero point
    template <int X>
    static int64_t place(int64_t row) { return row; }  // of a row of W in the sums of a strip

    // The words with the codes of `row` of a row of words (ROWS), from place `slot` of a strip.
    INLINE static Words codes_of(const uint32_t *words, int64_t slot, int64_t row) {
        return raw<Words>(words + slot) >> (uint32_t)(row * BITS);
    }

    // The products of the values of a group, in the order of `place`, are given to `take(m, sums, place)`.
    template <int X, class Take>
    INLINE static void add(const uint32_t *words, int64_t stride, const float *x, int64_t width, int64_t depth,
                           const Take &take) {
        constexpr int V = vectors<X>;
        Vec sum[X * V] = {};
        for (int64_t k = 0; k < depth; k += EACH, words += stride) {
            Words codes[V];
            UNROLLED
            for (int v = 0; v < V; ++v) {
                __builtin_prefetch(words + PREFETCHED * stride + v * LANES, 0, 2);
                codes[v] = raw<Words>(words + v * LANES);
            }
            UNROLLED
            for (int each = 0; each < EACH; ++each) {
                Vec w[V];
                UNROLLED
                for (int v = 0; v < V; ++v) w[v] = integer<BITS>(codes[v] >> (each * BITS));
                UNROLLED
                for (int m = 0; m < X; ++m) {
                    const Vec value = splat(x[m * width + k + each]);
                    UNROLLED
                    for (int v = 0; v < V; ++v) sum[m * V + v] = fma(w[v], value, sum[m * V + v]);
                }
            }
        }
        for (int m = 0; m < X; ++m)
            for (int v = 0; v < V; ++v) take(m, sum[m * V + v], v * LANES);
    }

private:
    static constexpr int64_t PREFETCHED = 4;  // rows of words
};

// AWQ: words (in, out / 8) with values of eight rows of W, zero points (groups, out / 8).
struct Across {
    static constexpr int BITS = 4, EACH = 8;
    static constexpr int64_t ROWS = 1;
    // The codes of a word whose sums are in registers at the same time.
    template <int X>
    static constexpr int codes = SUM_REGISTERS / X >= 8 ? 8 : SUM_REGISTERS / X >= 4 ? 4 : 2;
    template <int X>
    static constexpr int64_t strip_words = LANES;
    template <int X>
    static constexpr int64_t strip = EACH * LANES;

    static int64_t words(const PackedLinear &job) { return job.out / EACH; }
    static int64_t word_of(int64_t row) { return row / EACH; }
    // The row of W of each code, and the code of each row.
    static constexpr int shift(int64_t row) { return (int)(row % EACH % 2 * 16 + row % EACH / 2 * 4); }
    template <int X>
    static int64_t place(int64_t row) { return shift(row) / BITS * LANES + row / EACH; }
    INLINE static Words codes_of(const uint32_t *words, int64_t slot, int64_t) {
        return raw<Words>(words) >> (uint32_t)(slot / LANES * BITS);
    }

    template <int X, class Take>
    INLINE static void add(const uint32_t *words, int64_t stride, const float *x, int64_t width, int64_t depth,
                           const Take &take) {
        constexpr int V = codes<X>;
        for (int first = 0; first < EACH; first += V) {
            Vec sum[X * V] = {};
            const uint32_t *from = words;
            for (int64_t k = 0; k < depth; ++k, from += stride) {
                if (first == 0) __builtin_prefetch(from + PREFETCHED * stride, 0, 2);
                const Words some = raw<Words>(from) >> (first * BITS);
                Vec w[V];
                UNROLLED
                for (int v = 0; v < V; ++v) w[v] = integer<BITS>(some >> (v * BITS));
                UNROLLED
                for (int m = 0; m < X; ++m) {
                    const Vec value = splat(x[m * width + k]);
                    UNROLLED
                    for (int v = 0; v < V; ++v) sum[m * V + v] = fma(w[v], value, sum[m * V + v]);
                }
            }
            for (int m = 0; m < X; ++m)
                for (int v = 0; v < V; ++v) take(m, sum[m * V + v], (first + v) * LANES);
        }
    }

private:
    static constexpr int64_t PREFETCHED = 32;
};

// The scales, and the zero points less the middle, of group `g` of `count` rows of W from `n`, by their places.
template <class Kind, int X>
TARGET void strip_scales(const PackedLinear &job, int64_t g, int64_t n, int64_t count, float *scales, float *zeros) {
    constexpr int64_t STRIP = Kind::template strip<X>;
    float found[STRIP];
    widen(job.scale_type, job.scales, g * job.out + n, found, count);
    const uint32_t *words = (const uint32_t *)job.minimums + g * (job.out / Kind::EACH);
    const int offset = job.encoding->added - MIDDLE<Kind::BITS>;
    for (int64_t i = 0; i < STRIP; ++i) {
        const int64_t place = Kind::template place<X>(i);
        const int mask = (1 << Kind::BITS) - 1;
        scales[place] = i < count ? found[i] : 0.0f;
        zeros[place] = i < count ? (float)((int)(words[(n + i) / Kind::EACH] >> Kind::shift(n + i) & mask) + offset)
                                 : 0.0f;
    }
}

// Add the products of group `g` of a strip with rows `m` to `m` + X of x to `totals` (X, strip).
template <class Kind, int X>
APART void add_group(const PackedLinear &job, int64_t g, int64_t n, int64_t count, int64_t m, float *totals) {
    constexpr int64_t STRIP = Kind::template strip<X>, WORDS = Kind::template strip_words<X>;
    const int64_t begin = g * job.group, depth = std::min(job.group, job.in - begin), groups = groups_of(job);
    float scales[STRIP], zeros[STRIP];
    strip_scales<Kind, X>(job, g, n, count, scales, zeros);
    int64_t stride = Kind::words(job);
    const uint32_t *words = (const uint32_t *)job.packed + begin / Kind::ROWS * stride + Kind::word_of(n);
    static thread_local std::vector<uint32_t> complete;
    if (count < STRIP) {  // memory beyond the last row must not be read
        const int64_t rows = depth / Kind::ROWS;
        complete.assign(rows * WORDS, 0);
        for (int64_t row = 0; row < rows; ++row)
            memcpy(&complete[row * WORDS], words + row * stride, Kind::word_of(count) * sizeof *words);
        words = complete.data();
        stride = WORDS;
    }
    const float *sums = job.sums + m * groups + g;
    const auto take = [&](int row, Vec sum, int64_t place) INLINE_LAMBDA {
        float *to = totals + row * STRIP + place;
        const Vec shifted = fma(load(zeros + place), splat(-sums[row * groups]), sum);
        store(to, fma(shifted, load(scales + place), load(to)));
    };
    Kind::template add<X>(words, stride, (const float *)job.operand + m * job.in + begin, job.in, depth, take);
}

template <class T>
TARGET void write_row(const float *totals, T *to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(totals + i));
    if (i < count) store_part(to + i, load_part(totals + i, count - i), count - i);
}

// Write the products of a strip with rows `m` to `m` + X of x.
template <class Kind, int X>
TARGET void write_strip(const PackedLinear &job, const float *totals, int64_t m, int64_t n, int64_t count) {
    constexpr int64_t STRIP = Kind::template strip<X>;
    float bias[STRIP] = {}, found[STRIP];
    if (job.bias) widen(job.type, job.bias, n, bias, count);
    for (int64_t row = m; row < m + X; ++row, totals += STRIP) {
        for (int64_t i = 0; i < count; ++i) found[i] = totals[Kind::template place<X>(i)] + bias[i];
        const int64_t at = row * job.out + n;
        if (job.type == Type::float32) write_row(found, (float *)job.y + at, count);
        if (job.type == Type::bfloat16) write_row(found, (Bf16 *)job.y + at, count);
        if (job.type == Type::float16) write_row(found, (Half *)job.y + at, count);
    }
}

// All strips of a group before the next group, because the words of neighbouring strips share pages.
template <class Kind, int X>
TARGET void multiply_strips(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t STRIP = Kind::template strip<X>;
    const int64_t strips = (end - begin + STRIP - 1) / STRIP, groups = groups_of(job);
    static thread_local std::vector<float> room;
    float *totals = aligned(room, strips * X * STRIP);
    for (int64_t block = 0; block < job.rows; block += X) {
        const int64_t m = std::min(block, job.rows - X);  // the last block computes some rows twice
        std::fill_n(totals, strips * X * STRIP, 0.0f);
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t s = 0, n = begin; s < strips; ++s, n += STRIP)
                add_group<Kind, X>(job, g, n, std::min(STRIP, end - n), m, totals + s * X * STRIP);
        for (int64_t s = 0, n = begin; s < strips; ++s, n += STRIP)
            write_strip<Kind, X>(job, totals + s * X * STRIP, m, n, std::min(STRIP, end - n));
    }
}

// Divide x into as few blocks as possible, of nearly equal size.
template <class Kind, int X>
TARGET void multiply_columns(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t blocks = (job.rows + MAX_X - 1) / MAX_X;
    if ((job.rows + blocks - 1) / blocks == X) return multiply_strips<Kind, X>(job, begin, end);
    if constexpr (X > 1) multiply_columns<Kind, X - 1>(job, begin, end);
}

// x in float32, and the sums of its groups.
TARGET inline void prepare_columns(PackedLinear &job) {
    const int64_t groups = groups_of(job);
    float *x = aligned(job.wide, job.rows * (job.in + groups)), *sums = x + job.rows * job.in;
    widen(job.type, job.x, 0, x, job.rows * job.in);
    for (int64_t m = 0; m < job.rows; ++m) {
        for (int64_t g = 0; g < groups; ++g) {
            const float *from = x + m * job.in;
            float sum = 0.0f;
            for (int64_t i = g * job.group; i < std::min((g + 1) * job.group, job.in); ++i) sum += from[i];
            sums[m * groups + g] = sum;
        }
    }
    job.block = ENCODED_BLOCK;
    job.operand = x;
    job.sums = sums;
}

}  // namespace encoded
}  // namespace VARIANT
