// Products of 4 to 16 rows of x with group-wise integers, in float32, for processors without dot products. A weight is decoded
// in registers, and multiplied with up to 8 rows of x, whose sums are in registers too.
//
// All rows of x are larger than the L1 cache. Therefore a depth of their values stays there for all rows of a strip of W.
// Meanwhile, the next strip is prefetched, which is one run of memory. The sum of a row of W and a row of x is the same with any
// other rows.
#pragma once

namespace VARIANT {
namespace few_rows {

using linear::aligned;
using linear::few_rows_blocks;
using linear::few_rows_depth;
using linear::LINE;
using linear::widen;
using linear::write_outputs;

constexpr int64_t STRIP = 16;  // rows of W
// From a row of x to the next one. With LANES less, two loads from rows at once would use the same banks of the L1 cache.
constexpr int64_t pitch_of(int blocks) { return few_rows_depth(blocks) + LANES; }
// The rows of W that share the loads of x. A sum waits for the previous one, so four sums would be slower than eight.
constexpr int weights_of(int x) { return x == 4 ? 2 : 1; }

inline int64_t depth_of(const PackedLinear &job) {  // values, in whole groups
    return few_rows_depth(few_rows_blocks(job.rows)) / job.group * job.group;
}

// The layout of x: for each depth, the values of all rows.
TARGET inline void prepare(PackedLinear &job) {
    const int64_t depth = depth_of(job), depths = (job.in + depth - 1) / depth;
    const int64_t pitch = pitch_of(few_rows_blocks(job.rows));
    float *x = aligned(job.wide, depths * job.rows * pitch), *to = x;
    for (int64_t at = 0; at < job.in; at += depth)
        for (int64_t m = 0; m < job.rows; ++m, to += pitch)
            widen(job.type, job.x, m * job.in + at, to, std::min(depth, job.in - at));
    job.operand = x;
    job.block = STRIP;
}

// Groups of some rows of W that are multiplied at once, and the bytes to prefetch meanwhile.
template <int WEIGHTS>
struct Groups {
    const uint8_t *codes[WEIGHTS];
    const float *scales[WEIGHTS], *minimums[WEIGHTS];
    int64_t count, size;
    const uint8_t *ahead;
};

// Add the products with X rows of x to `totals` (WEIGHTS, X).
template <int BITS, int X, int64_t PITCH, int WEIGHTS>
APART void add_groups(const Groups<WEIGHTS> &w, const float *x, Vec *totals) {
    const int64_t octets = w.size * BITS / 8;
    Vec sum[WEIGHTS][X];
    UNROLLED
    for (int k = 0; k < WEIGHTS; ++k) {
        UNROLLED
        for (int m = 0; m < X; ++m) sum[k][m] = totals[k * X + m];
    }
    const uint8_t *ahead = w.ahead;
    for (int64_t g = 0, at = 0; g < w.count; ++g, at += octets, x += w.size) {
        for (const uint8_t *end = w.ahead + WEIGHTS * (at + octets); ahead < end; ahead += LINE)
            __builtin_prefetch(ahead, 0, 2);
        for (int64_t i = 0; i < octets; i += LANES) {
            Words codes[WEIGHTS];
            UNROLLED
            for (int k = 0; k < WEIGHTS; ++k) codes[k] = load_octets(w.codes[k] + at + i);
            UNROLLED
            for (int part = 0; part < 8 / BITS; ++part) {
                Vec weights[WEIGHTS];
                UNROLLED
                for (int k = 0; k < WEIGHTS; ++k) {
                    const Words q = BITS == 8 ? codes[k] : part ? codes[k] >> 4 : codes[k] & 15;
                    weights[k] = fma(to_float(q), splat(w.scales[k][g]), splat(w.minimums[k][g]));
                }
                UNROLLED
                for (int m = 0; m < X; ++m) {
                    const Vec values = load(x + m * PITCH + part * octets + i);
                    UNROLLED
                    for (int k = 0; k < WEIGHTS; ++k) sum[k][m] = fma(weights[k], values, sum[k][m]);
                }
            }
        }
    }
    UNROLLED
    for (int k = 0; k < WEIGHTS; ++k) {
        UNROLLED
        for (int m = 0; m < X; ++m) totals[k * X + m] = sum[k][m];
    }
}

// A strip of W, with its scales and minimums (count, groups) in float32.
struct Strip {
    int64_t first, count;
    const float *scales, *minimums;

    int64_t row(int64_t k) const { return std::min(k, count - 1); }  // memory beyond the last row must not be read
};

// The first row of a block of X rows of x. The last one begins early enough to be complete, and computes some rows twice.
inline int64_t first_row(const PackedLinear &job, int block, int x) { return std::min<int64_t>(block * x, job.rows - x); }

template <int BITS, int X, int BLOCKS>
TARGET void multiply_strip(const PackedLinear &job, const Strip &strip) {
    constexpr int WEIGHTS = weights_of(X);
    const int64_t octets = job.group * BITS / 8, row_bytes = job.groups() * octets, most = depth_of(job) / job.group;
    const uint8_t *codes = job.packed + strip.first * row_bytes, *next = codes + STRIP * row_bytes;
    constexpr int64_t PITCH = pitch_of(BLOCKS);
    const float *x = (const float *)job.operand;
    Vec totals[BLOCKS][STRIP * X] = {};
    for (int64_t g = 0; g < job.groups(); g += most, x += job.rows * PITCH) {
        const int64_t count = std::min(most, job.groups() - g);
        for (int64_t k = 0; k < strip.count; k += WEIGHTS) {
            Groups<WEIGHTS> w{};
            for (int i = 0; i < WEIGHTS; ++i) {
                const int64_t row = strip.row(k + i), place = row * job.groups() + g;
                w.codes[i] = codes + row * row_bytes + g * octets;
                w.scales[i] = strip.scales + place;
                w.minimums[i] = strip.minimums + place;
            }
            w.count = count;
            w.size = job.group;
            for (int block = 0; block < BLOCKS; ++block) {
                // The last block prefetches what is next; it finds the codes in the L1 cache.
                w.ahead = block == BLOCKS - 1 ? next : w.codes[0];
                const float *rows = x + first_row(job, block, X) * PITCH;
                add_groups<BITS, X, PITCH, WEIGHTS>(w, rows, totals[block] + k * X);
            }
            next += WEIGHTS * count * octets;
        }
    }
    for (int block = 0; block < BLOCKS; ++block)
        for (int64_t m = 0; m < X; ++m)
            for (int64_t k = 0; k < strip.count; k += LANES) {
                Vec some[LANES];
                for (int64_t i = 0; i < LANES; ++i) some[i] = totals[block][(k + i) * X + m];
                const int64_t written = std::min<int64_t>(LANES, strip.count - k);
                write_outputs(job, sums(some), first_row(job, block, X) + m, strip.first + k, written);
            }
}

template <int BITS, int BLOCKS, int X = linear::FEW_ROWS_BLOCK>
TARGET void multiply_rows(const PackedLinear &job, const Strip &strip) {
    if ((job.rows + BLOCKS - 1) / BLOCKS == X) return multiply_strip<BITS, X, BLOCKS>(job, strip);
    if constexpr (X > linear::LEAST_FEW_ROWS) multiply_rows<BITS, BLOCKS, X - 1>(job, strip);
}
template <int BITS>
TARGET void multiply_bits(const PackedLinear &job, const Strip &strip) {
    few_rows_blocks(job.rows) == 1 ? multiply_rows<BITS, 1>(job, strip) : multiply_rows<BITS, 2>(job, strip);
}

TARGET inline void multiply(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t groups = job.groups();
    static thread_local std::vector<float> room;
    float *scales = aligned(room, 2 * STRIP * groups), *minimums = scales + STRIP * groups;
    for (int64_t n = begin; n < end; n += STRIP) {
        const Strip strip = {n, std::min(STRIP, end - n), scales, minimums};
        widen(job.scale_type, job.scales, n * groups, scales, strip.count * groups);
        widen(job.scale_type, job.minimums, n * groups, minimums, strip.count * groups);
        job.bits == 4 ? multiply_bits<4>(job, strip) : multiply_bits<8>(job, strip);
    }
}

}  // namespace few_rows
}  // namespace VARIANT
