// Products of one row of x with group-wise integers, in float32, for processors without dot products (dwords.h).
//
// With the scale s, the minimum m and the codes q of a group:  x . w = s * (x . q) + m * sum(x). So a value takes a mask, a
// conversion and a product. Codes keep their places in a dword, and x is divided by the powers of two of these places once.
//
// Two rows of W share the loads of x. A block of x stays in the L1 cache for all rows of a strip; meanwhile, the next strip,
// which is one run of memory, is prefetched. Each row has the same sums in any strip.
#pragma once

namespace VARIANT {
namespace linear {
namespace one_row {

using dwords::CHUNK;
using dwords::Codes;

constexpr int64_t STRIP = 16;  // rows of W
constexpr int64_t BLOCK_BYTES = 16 << 10;  // of x
constexpr int PAIR = 2;  // rows of W that are multiplied at once
// Independent sums of a row: a sum waits for the previous one, and a processor looks only a few chunks ahead.
constexpr int CHAINS = 2;

// The sums of `groups` groups of a row, with zeros up to whole vectors.
TARGET inline void sum_groups(const float *row, int64_t group, int64_t groups, float *to) {
    for (int64_t g = 0; g < groups; g += LANES) {
        Vec total[LANES] = {};
        for (int64_t i = 0; i < std::min<int64_t>(LANES, groups - g); ++i)
            for (int64_t at = 0; at < group; at += LANES) total[i] += load(row + (g + i) * group + at);
        store(to + g, sums(total));
    }
}

// The layout of x: its values in the order of codes. `sums`: of the groups, padded.
template <int BITS>
TARGET void prepare_bits(PackedLinear &job) {
    float *room = aligned(job.wide, 2 * job.in + padded(job.groups())), *row = room + job.in, *totals = row + job.in;
    widen(job.type, job.x, 0, row, job.in);
    sum_groups(row, job.group, job.groups(), totals);
    dwords::order_groups<BITS, true>(row, job.group, job.groups(), room);
    job.operand = room;
    job.sums = totals;
    job.block = STRIP;
}

TARGET inline void prepare(PackedLinear &job) { job.bits == 4 ? prepare_bits<4>(job) : prepare_bits<8>(job); }

// A block of rows of W.
struct Block {
    const uint8_t *codes[PAIR];
    const float *scales[PAIR];
};

// Add the products of `groups` groups of `chunks` chunks to `totals`. LEAST: the number of chunks is the constant, so that
// compilers make no loop. Prefetch PAIR vectors from `ahead` for each chunk.
template <int BITS, bool LEAST>
APART void multiply_block(const Block &w, const float *x, int64_t groups, int64_t chunks, const uint8_t *ahead,
                          Vec (&totals)[PAIR]) {
    typedef Codes<BITS> Kind;
    Vec total[PAIR];
    UNROLLED
    for (int k = 0; k < PAIR; ++k) total[k] = totals[k];
    int64_t at = 0;
    for (int64_t g = 0; g < groups; ++g) {
        Vec sum[PAIR][CHAINS];
        UNROLLED
        for (int k = 0; k < PAIR; ++k) {
            UNROLLED
            for (int c = 0; c < CHAINS; ++c) sum[k][c] = Vec{};
        }
        UNROLLED
        for (int64_t c = 0; c < (LEAST ? Kind::LEAST_CHUNKS : chunks); ++c, at += CHUNK, x += Kind::VALUES) {
            Words dwords[PAIR];
            UNROLLED
            for (int k = 0; k < PAIR; ++k) dwords[k] = raw<Words>(w.codes[k] + at);
            __builtin_prefetch(ahead + PAIR * at, 0, 2);
            UNROLLED
            for (int p = 0; p < Kind::PARTS; ++p) {
                const Vec values = load(x + p * LANES);
                UNROLLED
                for (int k = 0; k < PAIR; ++k)
                    sum[k][p % CHAINS] = fma(Kind::code_in_place(dwords[k], p), values, sum[k][p % CHAINS]);
            }
        }
        UNROLLED
        for (int k = 0; k < PAIR; ++k) {
            UNROLLED
            for (int c = 1; c < CHAINS; ++c) sum[k][0] += sum[k][c];
            total[k] = fma(sum[k][0], splat(w.scales[k][g]), total[k]);
        }
    }
    UNROLLED
    for (int k = 0; k < PAIR; ++k) totals[k] = total[k];
}

// The products of the minimums of a row and the sums of x.
template <class S>
INLINE Vec multiply_minimums(const S *minimums, const float *sums, int64_t groups) {
    Vec total = {};
    int64_t g = 0;
    for (; g + LANES <= groups; g += LANES) total = fma(load(minimums + g), load(sums + g), total);
    return g == groups ? total : fma(load_part(minimums + g, groups - g), load(sums + g), total);
}

// S: the type of scales.
template <int BITS, class S>
TARGET void multiply_strips(const PackedLinear &job, int64_t begin, int64_t end) {
    typedef Codes<BITS> Kind;
    const int64_t groups = job.groups(), row_bytes = job.in * BITS / 8, chunks = job.group / Kind::VALUES;
    const int64_t most = std::max<int64_t>(BLOCK_BYTES / (int64_t)sizeof(float) / job.group, 1);
    static thread_local std::vector<float> room;
    float *scales = aligned(room, STRIP * groups);
    for (int64_t n = begin; n < end; n += STRIP) {
        const int64_t count = std::min(STRIP, end - n);
        Vec totals[STRIP / PAIR][PAIR] = {};
        widen((const S *)job.scales + n * groups, scales, count * groups);
        for (int64_t k = 0; k < count; ++k)
            totals[k / PAIR][k % PAIR] = multiply_minimums((const S *)job.minimums + (n + k) * groups, job.sums, groups);
        const uint8_t *codes = job.packed + n * row_bytes, *next = codes + STRIP * row_bytes;
        for (int64_t first = 0; first < groups; first += most) {
            const int64_t some = std::min(most, groups - first), offset = first * chunks * CHUNK;
            for (int64_t k = 0; k < count; k += PAIR) {
                Block w;
                for (int i = 0; i < PAIR; ++i) {
                    const int64_t row = std::min(k + i, count - 1);  // memory beyond the last row must not be read
                    w.codes[i] = codes + row * row_bytes + offset;
                    w.scales[i] = scales + row * groups + first;
                }
                const float *x = (const float *)job.operand + first * job.group;
                if (chunks == Kind::LEAST_CHUNKS) multiply_block<BITS, true>(w, x, some, chunks, next, totals[k / PAIR]);
                else multiply_block<BITS, false>(w, x, some, chunks, next, totals[k / PAIR]);
                next += PAIR * some * chunks * CHUNK;
            }
        }
        for (int64_t k = 0; k < count; k += LANES) {
            Vec some[LANES];
            for (int64_t i = 0; i < LANES; ++i) some[i] = totals[(k + i) / PAIR][(k + i) % PAIR];
            write_outputs(job, sums(some), 0, n + k, std::min<int64_t>(LANES, count - k));
        }
    }
}

template <class S>
TARGET void multiply_as(const PackedLinear &job, int64_t begin, int64_t end) {
    job.bits == 4 ? multiply_strips<4, S>(job, begin, end) : multiply_strips<8, S>(job, begin, end);
}
TARGET inline void multiply(const PackedLinear &job, int64_t begin, int64_t end) {
    job.scale_type == Type::float16 ? multiply_as<Half>(job, begin, end) : multiply_as<Bf16>(job, begin, end);
}

}  // namespace one_row
}  // namespace linear
}  // namespace VARIANT
