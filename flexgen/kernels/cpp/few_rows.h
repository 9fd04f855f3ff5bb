// Products of 2 to 14 rows of x with group-wise integers, in float32, for processors without dot products (dwords.h). A
// weight is decoded in registers, and multiplied with up to 8 rows of x, whose sums are in registers too.
//
// All rows of x are larger than the L1 cache. Therefore a depth of their values stays there for all rows of a strip of W.
// Meanwhile, the next strip is prefetched, which is one run of memory. The sum of a row of W and a row of x is the same with any
// other rows.
#pragma once

namespace VARIANT {
namespace linear {
namespace few_rows {

using dwords::CHUNK;
using dwords::Codes;

constexpr int64_t STRIP = 16;  // rows of W
// From a row of x to the next one. With LANES less, two loads from rows at once would use the same banks of the L1 cache.
constexpr int64_t pitch_of(int blocks) { return few_rows_depth(blocks) + LANES; }
// Independent sums of a product. A sum waits for the previous one, so fewer than eight sums would be slower.
constexpr int chains_of(int x) { return x == 2 ? 4 : x == 3 ? 3 : x <= 5 ? 2 : 1; }

inline int64_t depth_of(const PackedLinear &job) {  // values, in whole groups
    return few_rows_depth(few_rows_blocks(job.rows)) / job.group * job.group;
}

// The layout of x: for each depth, the values of all rows, in the order of codes.
template <int BITS>
TARGET void prepare_bits(PackedLinear &job) {
    const int64_t depth = depth_of(job), depths = (job.in + depth - 1) / depth;
    const int64_t pitch = pitch_of(few_rows_blocks(job.rows));
    float *x = aligned(job.wide, depths * job.rows * pitch), *to = x, values[few_rows_depth(1)];
    for (int64_t at = 0; at < job.in; at += depth)
        for (int64_t m = 0; m < job.rows; ++m, to += pitch) {
            const int64_t count = std::min(depth, job.in - at);
            widen(job.type, job.x, m * job.in + at, values, count);
            dwords::order_groups<BITS, false>(values, job.group, count / job.group, to);
        }
    job.operand = x;
    job.block = STRIP;
}

TARGET inline void prepare(PackedLinear &job) { job.bits == 4 ? prepare_bits<4>(job) : prepare_bits<8>(job); }

// Groups of a row of W, and the bytes to prefetch while they are multiplied.
struct Groups {
    const uint8_t *codes;
    const float *scales, *minimums;
    int64_t count, chunks;  // chunks: of a group
    const uint8_t *ahead;
};

// Add the products with X rows of x to `totals`. LEAST: the number of chunks is the constant, so that compilers make no loop.
template <int BITS, int X, int64_t PITCH, bool LEAST>
APART void add_groups(const Groups &w, const float *x, Vec (&totals)[X]) {
    typedef Codes<BITS> Kind;
    constexpr int CHAINS = chains_of(X);
    Vec sum[X][CHAINS] = {};
    UNROLLED
    for (int m = 0; m < X; ++m) sum[m][0] = totals[m];
    int64_t at = 0;
    for (int64_t g = 0; g < w.count; ++g) {
        const Vec scale = splat(w.scales[g]), minimum = splat(w.minimums[g]);
        UNROLLED
        for (int64_t c = 0; c < (LEAST ? Kind::LEAST_CHUNKS : w.chunks); ++c, at += CHUNK, x += Kind::VALUES) {
            const Words dwords = raw<Words>(w.codes + at);
            __builtin_prefetch(w.ahead + at, 0, 2);
            UNROLLED
            for (int p = 0; p < Kind::PARTS; ++p) {
                const Vec weights = fma(Kind::code(dwords, p), scale, minimum);
                UNROLLED
                for (int m = 0; m < X; ++m)
                    sum[m][p % CHAINS] = fma(weights, load(x + m * PITCH + p * LANES), sum[m][p % CHAINS]);
            }
        }
    }
    UNROLLED
    for (int m = 0; m < X; ++m) {
        UNROLLED
        for (int c = 1; c < CHAINS; ++c) sum[m][0] += sum[m][c];
        totals[m] = sum[m][0];
    }
}

// A strip of W, with its scales and minimums (count, groups) in float32.
struct Strip {
    int64_t first, count;
    const float *scales, *minimums;
};

// The first row of a block of X rows of x. The last one begins early enough to be complete, and computes some rows twice.
inline int64_t first_row(const PackedLinear &job, int block, int x) { return std::min<int64_t>(block * x, job.rows - x); }

template <int BITS, int X, int BLOCKS>
TARGET void multiply_strip(const PackedLinear &job, const Strip &strip) {
    constexpr int64_t PITCH = pitch_of(BLOCKS), LEAST_CHUNKS = Codes<BITS>::LEAST_CHUNKS;
    const int64_t row_bytes = job.in * BITS / 8, chunks = job.group / Codes<BITS>::VALUES, octets = chunks * CHUNK;
    const int64_t groups = job.groups(), most = depth_of(job) / job.group;
    const uint8_t *codes = job.packed + strip.first * row_bytes, *next = codes + STRIP * row_bytes;
    const float *x = (const float *)job.operand;
    Vec totals[BLOCKS][STRIP][X] = {};
    for (int64_t g = 0; g < groups; g += most, x += job.rows * PITCH) {
        const int64_t count = std::min(most, groups - g);
        for (int64_t k = 0; k < strip.count; ++k, next += count * octets) {
            const int64_t place = k * groups + g;
            Groups w = {codes + k * row_bytes + g * octets, strip.scales + place, strip.minimums + place, count, chunks, next};
            for (int block = 0; block < BLOCKS; ++block) {
                // The last block prefetches what is next; it finds the codes in the L1 cache.
                w.ahead = block == BLOCKS - 1 ? next : w.codes;
                const float *rows = x + first_row(job, block, X) * PITCH;
                if (chunks == LEAST_CHUNKS) add_groups<BITS, X, PITCH, true>(w, rows, totals[block][k]);
                else add_groups<BITS, X, PITCH, false>(w, rows, totals[block][k]);
            }
        }
    }
    for (int block = 0; block < BLOCKS; ++block)
        for (int64_t m = 0; m < X; ++m)
            for (int64_t k = 0; k < strip.count; k += LANES) {
                Vec some[LANES];
                for (int64_t i = 0; i < LANES; ++i) some[i] = totals[block][k + i][m];
                const int64_t written = std::min<int64_t>(LANES, strip.count - k);
                write_outputs(job, sums(some), first_row(job, block, X) + m, strip.first + k, written);
            }
}

template <int BITS, int BLOCKS, int X = FEW_ROWS_BLOCK>
TARGET void multiply_rows(const PackedLinear &job, const Strip &strip) {
    if ((job.rows + BLOCKS - 1) / BLOCKS == X) return multiply_strip<BITS, X, BLOCKS>(job, strip);
    if constexpr (X > LEAST_FEW_ROWS) multiply_rows<BITS, BLOCKS, X - 1>(job, strip);
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
}  // namespace linear
}  // namespace VARIANT
