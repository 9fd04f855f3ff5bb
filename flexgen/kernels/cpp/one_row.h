// Products of one row of x with group-wise integers, in float32, for processors without dot products.
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

constexpr int64_t CHUNK = LANES * (int64_t)sizeof(uint32_t);  // bytes of codes in a vector
constexpr int64_t STRIP = 16;  // rows of W
constexpr int64_t BLOCK_BYTES = 16 << 10;  // of x
constexpr int PAIR = 2;  // rows of W that are multiplied at once
// Independent sums of a row: a sum waits for the previous one, and a processor looks only a few chunks ahead.
constexpr int CHAINS = 2;

template <int BITS>
struct Codes {
    static constexpr int PARTS = 32 / BITS;  // the codes of a dword
    static constexpr int64_t VALUES = PARTS * LANES;  // of a chunk
    static constexpr int64_t LEAST_CHUNKS = ONE_ROW_GROUP / VALUES;  // of a group
    static_assert(ONE_ROW_GROUP % VALUES == 0, "a chunk has codes of only one group");

    INLINE static Vec of(Words dwords, int part) {
        const int shift = BITS * part;  // the last code is shifted, because conversions are signed
        return to_float(part == PARTS - 1 ? dwords >> shift : dwords & (((1u << BITS) - 1) << shift));
    }
    // What x is multiplied with.
    static constexpr float factor(int part) { return part == PARTS - 1 ? 1.0f : 1.0f / (1u << BITS * part); }
};

// Vector i of the result has octet i of each dword, of 32 octets.
INLINE void by_octets(const float *from, Vec (&to)[4]) {
    __m256 some[4];
    UNROLLED
    for (int i = 0; i < 4; ++i) some[i] = _mm256_set_m128(_mm_loadu_ps(from + 16 + 4 * i), _mm_loadu_ps(from + 4 * i));
    const __m256d a = (__m256d)_mm256_unpacklo_ps(some[0], some[1]), b = (__m256d)_mm256_unpacklo_ps(some[2], some[3]);
    const __m256d c = (__m256d)_mm256_unpackhi_ps(some[0], some[1]), d = (__m256d)_mm256_unpackhi_ps(some[2], some[3]);
    to[0] = (Vec)_mm256_unpacklo_pd(a, b);
    to[1] = (Vec)_mm256_unpackhi_pd(a, b);
    to[2] = (Vec)_mm256_unpacklo_pd(c, d);
    to[3] = (Vec)_mm256_unpackhi_pd(c, d);
}

// x: for each chunk, a vector for each part. `sums`: of the groups, padded.
template <int BITS>
TARGET void prepare_bits(PackedLinear &job) {
    typedef Codes<BITS> Kind;
    constexpr int EACH = 8 / BITS;  // the codes of an octet. Those of a group with two: all first ones, then all second ones
    const int64_t groups = job.groups(), octets = job.group / EACH;
    float *room = aligned(job.wide, 2 * job.in + padded(groups)), *row = room + job.in, *totals = row + job.in, *to = room;
    widen(job.type, job.x, 0, row, job.in);
    for (int64_t g = 0; g < groups; g += LANES) {
        Vec total[LANES] = {};
        for (int64_t i = 0; i < std::min<int64_t>(LANES, groups - g); ++i)
            for (int64_t at = 0; at < job.group; at += LANES) total[i] += load(row + (g + i) * job.group + at);
        store(totals + g, sums(total));
    }
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t at = 0; at < octets; at += CHUNK, to += Kind::VALUES) {
            UNROLLED
            for (int code = 0; code < EACH; ++code) {
                Vec some[4];
                by_octets(row + g * job.group + code * octets + at, some);
                UNROLLED
                for (int i = 0; i < 4; ++i) {
                    const int part = EACH * i + code;
                    store(to + part * LANES, some[i] * Kind::factor(part));
                }
            }
        }
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
                for (int k = 0; k < PAIR; ++k) sum[k][p % CHAINS] = fma(Kind::of(dwords[k], p), values, sum[k][p % CHAINS]);
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
