// Products with group-wise integers whose unpacked codes stay in registers. The arithmetic units for products are busy while
// other units unpack, so unpacking again for each block of 16 rows of x costs less than writing the unpacked codes and
// reading them. The blocks of x that fit in the L2 cache are multiplied with all strips before the next ones.
//
// The 16 rows of a strip are read in step, which no prefetcher of a processor expects. So while a strip is multiplied, the
// next one, which is one run of memory, is prefetched line by line.
#pragma once

namespace VARIANT {
namespace dots {

constexpr int64_t BLOCKS_BYTES = 512 << 10;  // of x, which stay in the L2 cache for all strips of a piece of W

// The independent sums of a row of x: a sum has to wait for the previous one, which takes several cycles.
constexpr int fused_chains(int x) { return x <= 3 ? 4 : x <= 8 ? 2 : 1; }

// Multiply a strip, whose rows of `stride` bytes begin at `codes`, with X rows of x. The products are added to `totals` (X,
// STRIP). `room` is for the dwords of two pieces.
template <class Kind, int BITS, int X>
APART void multiply_strip(const uint8_t *codes, int64_t stride, const uint32_t *x, Scaling scaling, int64_t chunks,
                          __m512i (*room)[8], float *totals) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    constexpr int64_t PIECES = VALUES * BITS / 8 / PIECE;
    constexpr int CHAINS = fused_chains(X);
    const uint8_t *ahead = codes + STRIP * stride, *last = codes + (chunks * PIECES - 1) * PIECE;
    __m512i *now = room[0], *next = room[1];
    Transposer first{codes, stride, now, {}, {}};
    UNROLLED
    for (int i = 0; i < 8; ++i) first.work(i);
    for (int64_t c = 0; c < chunks; ++c) {
        typename Kind::Sum sum[CHAINS][X] = {};
        for (int64_t piece = 0; piece < PIECES; ++piece) {
            codes = std::min(codes + PIECE, last);
            Transposer transposer{codes, stride, next, {}, {}};
            UNROLLED
            for (int i = 0; i < 8; ++i) {
                __m512i w[STEPS];
                Kind::unpack(kept(now[i]), w, std::integral_constant<int, BITS>());
                transposer.work(i);
                __builtin_prefetch(ahead, 0, 2);
                ahead += LINE;
                UNROLLED
                for (int step = 0; step < STEPS; ++step, x += X) {
                    UNROLLED
                    for (int m = 0; m < X; ++m) {
                        typename Kind::Sum &to = sum[(i * STEPS + step) % CHAINS][m];
                        to = Kind::add_each(to, w[step], x + m);
                    }
                }
            }
            std::swap(now, next);
        }
        const Vec scale = load(scaling.scales + c * STRIP), minimum = load(scaling.minimums + c * STRIP);
        UNROLLED
        for (int m = 0; m < X; ++m) {
            UNROLLED
            for (int chain = 1; chain < CHAINS; ++chain) sum[0][m] = Kind::both(sum[0][m], sum[chain][m]);
            const Vec both = Kind::ROUNDED ? scale * splat(scaling.x_scales[c * X + m]) : scale;
            const Vec total = fma(minimum, splat(scaling.sums[c * X + m]), load(totals + m * STRIP));
            store(totals + m * STRIP, fma(Kind::number(sum[0][m]), both, total));
        }
    }
}

typedef void (*MultiplyStrip)(const uint8_t *, int64_t, const uint32_t *, Scaling, int64_t, __m512i (*)[8], float *);

template <class Kind, int BITS, int... N>
inline MultiplyStrip strip_function(int64_t rows, std::integer_sequence<int, N...>) {
    constexpr MultiplyStrip functions[] = {multiply_strip<Kind, BITS, N + 1>...};
    return functions[rows - 1];
}

// Multiply with blocks `first` to `last` of x.
template <class Kind, int BITS>
TARGET void multiply_blocks(const PackedLinear &job, int64_t begin, int64_t end, int64_t first, int64_t last) {
    constexpr int64_t STEPS = chunk_steps<Kind>;
    const int64_t chunks = chunks_of(job), stride = padded(chunks), row_bytes = job.in * BITS / 8;
    const int64_t blocks = blocks_of(job), m_begin = block_begin(job, first, blocks), m_end = block_begin(job, last, blocks);
    static thread_local std::vector<float> room;
    const int64_t sums = STRIP * (m_end - m_begin);
    float *totals = aligned(room, sums + STRIP * (2 * chunks + 2 * stride) + STRIP * row_bytes / (int64_t)sizeof(float));
    float *scales = totals + sums, *minimums = scales + chunks * STRIP, *row = minimums + chunks * STRIP;
    uint8_t *incomplete = (uint8_t *)(row + 2 * STRIP * stride);
    __m512i dwords[2][8];
    for (int64_t n = begin; n < end; n += STRIP) {
        const int64_t count = std::min(STRIP, end - n);
        const uint8_t *codes = job.packed + n * row_bytes;
        if (count < STRIP) {  // memory beyond the matrix must not be read
            memcpy(incomplete, codes, count * row_bytes);
            memset(incomplete + count * row_bytes, 0, (STRIP - count) * row_bytes);
            codes = incomplete;
        }
        strip_scales<Kind, BITS>(job, n, count, STRIP, row, scales, minimums);
        std::fill_n(totals, sums, 0.0f);
        for (int64_t block = first; block < last; ++block) {
            const int64_t m = block_begin(job, block, blocks), x_rows = block_begin(job, block + 1, blocks) - m;
            const int64_t at = m * chunks;
            const MultiplyStrip multiply = strip_function<Kind, BITS>(x_rows, Rows<MOST_FUSED>());
            multiply(codes, row_bytes, (const uint32_t *)job.operand + at * STEPS,
                     {scales, minimums, job.sums + at, job.x_scales + at}, chunks, dwords, totals + (m - m_begin) * STRIP);
        }
        for (int64_t m = m_begin; m < m_end; ++m) write_outputs(job, load(totals + (m - m_begin) * STRIP), m, n, count);
    }
}

template <class Kind, int BITS>
TARGET void multiply_fused(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t blocks = blocks_of(job), block_bytes = job.in * MOST_FUSED * (int64_t)sizeof(Bf16);
    const int64_t most = std::max<int64_t>(BLOCKS_BYTES / block_bytes, 1);
    for (int64_t block = 0; block < blocks; block += most)
        multiply_blocks<Kind, BITS>(job, begin, end, block, std::min(block + most, blocks));
}

}  // namespace dots
}  // namespace VARIANT
