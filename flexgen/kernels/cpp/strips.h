// Products of more rows of x with group-wise integers. A vector has one operand of each of 16 rows of W, so the scales
// of the rows are vectors too and the sums need no shuffles.
//
// A strip is 16 rows of W. While the codes of one or two strips are multiplied, those of the next ones are read in the
// order of the memory and put into a buffer, by pieces of 32 bytes, in the order of use. Reading 16 rows in step
// misleads prefetchers, and rows of a large power of two share the sets of a cache. With few rows of x, the unpacked
// codes stay in registers; with more, they are written to a tile in the L1 cache, for several blocks of rows.
#pragma once

#include <utility>

namespace VARIANT {
namespace dots {

constexpr int64_t STRIP = LANES;  // rows
constexpr int64_t PIECE = 32;  // bytes: 8 dwords
constexpr int MOST_FUSED = 16, MOST_TILED = 14;  // rows of x with all sums in registers

inline int64_t pieces_of(const PackedLinear &job) { return job.in * job.bits / 8 / PIECE; }

// The number of blocks of rows of x, and the first row of each; they differ by one row at most.
inline bool fused(const PackedLinear &job) { return job.rows <= MOST_FUSED; }
inline int64_t blocks_of(const PackedLinear &job) {
    return fused(job) ? 1 : (job.rows + MOST_TILED - 1) / MOST_TILED;
}
inline int64_t block_begin(const PackedLinear &job, int64_t block, int64_t blocks) { return job.rows * block / blocks; }

// x: for each chunk and block, the steps (steps, rows of the block). `sums` and `x_scales`: (chunks, rows).
template <class Kind, int BITS>
TARGET void prepare_strips(PackedLinear &job) {
    const int64_t chunks = chunks_of(job), blocks = blocks_of(job), each = chunk_steps<Kind>;
    float *room = aligned(job.wide, job.rows * chunks * (each + 2));
    uint32_t *operand = (uint32_t *)room;
    float *sums = room + job.rows * chunks * each, *scales = sums + job.rows * chunks;
    Ordered chunk;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block_begin(job, block, blocks), end = block_begin(job, block + 1, blocks);
        for (int64_t m = begin; m < end; ++m) {
            for (int64_t c = 0; c < chunks; ++c) {
                order_chunk<BITS>(job, m, c, chunk, Kind());
                uint32_t *to = operand + (c * job.rows + begin) * each + m - begin;
                for (int64_t step = 0; step < each; ++step) to[step * (end - begin)] = chunk.steps[step];
                sums[c * job.rows + m] = chunk.sum;
                scales[c * job.rows + m] = chunk.scale;
            }
        }
    }
    job.operand = operand;
    job.sums = sums;
    job.x_scales = scales;
}

// The place of row `n` of a strip among the pieces: see `transposed`.
INLINE int64_t slot(int64_t n) { return n / 8 * 8 + n % 4 * 2 + n / 4 % 2; }

// Reads the codes of STRIPS strips in order, and writes pieces (pieces of a row, STRIPS, slots).
template <int STRIPS>
struct Reader {
    const uint8_t *from, *end;
    uint8_t *to;
    int64_t pieces, row = 0, at = 0;

    INLINE void read(int64_t count) {
        while (count > 0 && from < end) {
            const int64_t some = std::min(count, pieces - at);
            uint8_t *target = to + ((at * STRIPS + row / STRIP) * STRIP + slot(row % STRIP)) * PIECE;
            for (int64_t i = 0; i < some; ++i) {
                __builtin_prefetch(from + i * PIECE + 4096);
                _mm256_storeu_si256((__m256i *)(target + i * STRIPS * STRIP * PIECE),
                                    _mm256_loadu_si256((const __m256i *)(from + i * PIECE)));
            }
            from += some * PIECE;
            count -= some;
            at += some;
            if (at == pieces) at = 0, ++row;
        }
    }
};

// Vector i of the result has dword i of the pieces of 16 rows.
INLINE void transposed(const uint8_t *pieces, __m512i (&to)[8]) {
    __m512i fours[2][4];
    UNROLLED
    for (int half = 0; half < 2; ++half) {
        const uint8_t *from = pieces + half * 8 * PIECE;
        const __m512i a = load_line(from), b = load_line(from + LINE);
        const __m512i c = load_line(from + 2 * LINE), d = load_line(from + 3 * LINE);
        const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
        fours[half][0] = _mm512_unpacklo_epi64(ab, cd);
        fours[half][1] = _mm512_unpackhi_epi64(ab, cd);
        fours[half][2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        fours[half][3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    UNROLLED
    for (int i = 0; i < 4; ++i) {
        to[i] = _mm512_shuffle_i32x4(fours[0][i], fours[1][i], 0x88);
        to[4 + i] = _mm512_shuffle_i32x4(fours[0][i], fours[1][i], 0xdd);
    }
}

// The scales and minimums of a chunk for STRIPS strips, and what belongs to the rows of a block of x.
struct Around {
    const float *scales, *minimums, *sums, *x_scales;
};

// Add the sums of a chunk to the totals (X, STRIPS) vectors.
template <class Kind, int X, int STRIPS>
INLINE void add_scaled(const typename Kind::Sum (&sum)[X][STRIPS], const Around &around, float *totals) {
    UNROLLED
    for (int strip = 0; strip < STRIPS; ++strip) {
        const Vec scale = load(around.scales + strip * STRIP), minimum = load(around.minimums + strip * STRIP);
        UNROLLED
        for (int m = 0; m < X; ++m) {
            float *to = totals + (m * STRIPS + strip) * STRIP;
            const Vec both = Kind::ROUNDED ? scale * splat(around.x_scales[m]) : scale;
            const Vec total = fma(minimum, splat(around.sums[m]), load(to));
            store(to, fma(Kind::number(sum[m][strip]), both, total));
        }
    }
}

template <class Kind, int BITS, int X>
APART void add_fused(const uint8_t *codes, const uint32_t *x, const Around &around, float *totals) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    typename Kind::Sum sum[X][1] = {};
    for (int64_t piece = 0; piece < VALUES * BITS / 8 / PIECE; ++piece, codes += STRIP * PIECE) {
        __m512i dwords[8];
        transposed(codes, dwords);
        asm volatile("" : : "r"(dwords) : "memory");  // they leave their registers to the sums
        for (int i = 0; i < 8; ++i, x += STEPS * X) {
            __m512i w[STEPS];
            Kind::unpack(dwords[i], w, std::integral_constant<int, BITS>());
            UNROLLED
            for (int step = 0; step < STEPS; ++step)
                UNROLLED
                for (int m = 0; m < X; ++m) sum[m][0] = Kind::add(sum[m][0], w[step], broadcast(x + step * X + m));
        }
    }
    add_scaled<Kind, X, 1>(sum, around, totals);
}

// Unpack a chunk of two strips to a tile (steps, 2) vectors.
template <class Kind, int BITS>
APART void unpack_tile(const uint8_t *codes, __m512i *tile) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    for (int64_t piece = 0; piece < VALUES * BITS / 8 / PIECE; ++piece, tile += 8 * STEPS * 2) {
        for (int strip = 0; strip < 2; ++strip, codes += STRIP * PIECE) {
            __m512i dwords[8];
            transposed(codes, dwords);
            UNROLLED
            for (int i = 0; i < 8; ++i) {
                __m512i w[STEPS];
                Kind::unpack(dwords[i], w, std::integral_constant<int, BITS>());
                UNROLLED
                for (int step = 0; step < STEPS; ++step) tile[(i * STEPS + step) * 2 + strip] = w[step];
            }
        }
    }
}

template <class Kind, int X>
APART void add_tile(const __m512i *tile, const uint32_t *x, const Around &around, float *totals) {
    typename Kind::Sum sum[X][2] = {};
    for (int64_t step = 0; step < chunk_steps<Kind>; ++step, x += X) {
        const __m512i first = tile[2 * step], second = tile[2 * step + 1];
        UNROLLED
        for (int m = 0; m < X; ++m) {
            const __m512i values = broadcast(x + m);
            sum[m][0] = Kind::add(sum[m][0], first, values);
            sum[m][1] = Kind::add(sum[m][1], second, values);
        }
    }
    add_scaled<Kind, X, 2>(sum, around, totals);
}

typedef void (*AddFused)(const uint8_t *, const uint32_t *, const Around &, float *);
typedef void (*AddTile)(const __m512i *, const uint32_t *, const Around &, float *);

template <class Kind, int BITS, int... N>
inline AddFused fused_function(int64_t rows, std::integer_sequence<int, N...>) {
    constexpr AddFused functions[] = {add_fused<Kind, BITS, N + 1>...};
    return functions[rows - 1];
}
template <class Kind, int... N>
inline AddTile tile_function(int64_t rows, std::integer_sequence<int, N...>) {
    constexpr AddTile functions[] = {add_tile<Kind, N + 1>...};
    return functions[rows - 1];
}

// The scales and minimums of the `count` rows from `n` as (chunks, width) in float32, with zeros beyond them.
template <class Kind, int BITS>
TARGET inline void strip_scales(const PackedLinear &job, int64_t n, int64_t count, int64_t width, float *row, float *scales,
                         float *minimums) {
    const int64_t chunks = chunks_of(job), stride = padded(chunks);
    for (int64_t strip = 0; strip < width; strip += STRIP) {
        for (int64_t k = 0; k < STRIP; ++k) {
            float *to = row + k * 2 * stride;
            if (strip + k < count) chunk_scales<Kind, BITS>(job, n + strip + k, to, to + stride);
            else std::fill_n(to, 2 * stride, 0.0f);
        }
        for (int64_t c = 0; c < chunks; c += LANES) {
            const int64_t some = std::min<int64_t>(LANES, chunks - c);
            transpose(row + c, 2 * stride, scales + c * width + strip, width, some);
            transpose(row + stride + c, 2 * stride, minimums + c * width + strip, width, some);
        }
    }
}

template <class Kind, int BITS, int STRIPS>
TARGET void multiply_strips(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t WIDTH = STRIPS * STRIP, CHUNK_PIECES = VALUES * BITS / 8 / PIECE;
    const int64_t chunks = chunks_of(job), stride = padded(chunks), blocks = blocks_of(job);
    const int64_t row_bytes = job.in * BITS / 8, buffer_bytes = WIDTH * row_bytes, tile_bytes = VALUES * 2 * LINE;
    static thread_local std::vector<float> room;
    uint8_t *at = (uint8_t *)aligned(room, (2 * buffer_bytes + tile_bytes) / (int64_t)sizeof(float) +
                                                       job.rows * WIDTH + 2 * chunks * WIDTH + 2 * stride * STRIP);
    uint8_t *now = at, *next = at + buffer_bytes;
    __m512i *tile = (__m512i *)(next + buffer_bytes);
    float *totals = (float *)((uint8_t *)tile + tile_bytes), *scales = totals + job.rows * WIDTH;
    float *minimums = scales + chunks * WIDTH, *row = minimums + chunks * WIDTH;
    const uint8_t *from = job.packed + begin * row_bytes, *last = job.packed + end * row_bytes;
    Reader<STRIPS>{from, last, now, pieces_of(job)}.read(WIDTH * pieces_of(job));
    for (int64_t n = begin; n < end; n += WIDTH, std::swap(now, next)) {
        const int64_t count = std::min(WIDTH, end - n);
        strip_scales<Kind, BITS>(job, n, count, WIDTH, row, scales, minimums);
        std::fill_n(totals, job.rows * WIDTH, 0.0f);
        Reader<STRIPS> reader{job.packed + (n + count) * row_bytes, last, next, pieces_of(job)};
        for (int64_t c = 0; c < chunks; ++c) {
            reader.read(CHUNK_PIECES * WIDTH);
            const uint8_t *codes = now + c * CHUNK_PIECES * WIDTH * PIECE;
            const uint32_t *x = (const uint32_t *)job.operand + c * job.rows * chunk_steps<Kind>;
            Around around{scales + c * WIDTH, minimums + c * WIDTH, job.sums + c * job.rows,
                          job.x_scales + c * job.rows};
            if constexpr (STRIPS == 1) {
                const auto every = std::make_integer_sequence<int, MOST_FUSED>();
                fused_function<Kind, BITS>(job.rows, every)(codes, x, around, totals);
            } else {
                unpack_tile<Kind, BITS>(codes, tile);
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t m = block_begin(job, block, blocks), rows = block_begin(job, block + 1, blocks) - m;
                    const Around own{around.scales, around.minimums, around.sums + m, around.x_scales + m};
                    const auto every = std::make_integer_sequence<int, MOST_TILED>();
                    tile_function<Kind>(rows, every)(tile, x + m * chunk_steps<Kind>, own, totals + m * WIDTH);
                }
            }
        }
        for (int64_t m = 0; m < job.rows; ++m)
            for (int64_t strip = 0; strip < count; strip += STRIP)
                write_outputs(job, load(totals + m * WIDTH + strip), m, n + strip, std::min(STRIP, count - strip));
    }
}

}  // namespace dots
}  // namespace VARIANT
