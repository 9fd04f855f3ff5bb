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
void prepare_strips(PackedLinear &job) {
    const int64_t count = job.rows * chunks_of(job), values = count * chunk_steps<Kind>;
    float *room = aligned(job.wide, values + 2 * count);
    job.operand = room;
    job.sums = room + values;
    job.x_scales = room + values + count;
    job.parts = blocks_of(job);
}

// Fill the layout of `prepare_strips` for some blocks.
template <class Kind, int BITS>
TARGET void order_strips(const PackedLinear &job, int64_t first, int64_t last) {
    const int64_t chunks = chunks_of(job), blocks = blocks_of(job), each = chunk_steps<Kind>;
    uint32_t *operand = (uint32_t *)job.operand;
    float *sums = (float *)job.sums, *scales = (float *)job.x_scales;
    Ordered chunk;
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block_begin(job, block, blocks), rows = block_begin(job, block + 1, blocks) - begin;
        for (int64_t c = 0; c < chunks; ++c) {
            for (int64_t m = 0; m < rows; ++m) {
                order_chunk<BITS>(job, begin + m, c, chunk, Kind());
                uint32_t *to = operand + (c * job.rows + begin) * each + m;
                for (int64_t step = 0; step < each; ++step) to[step * rows] = chunk.steps[step];
                sums[c * job.rows + begin + m] = chunk.sum;
                scales[c * job.rows + begin + m] = chunk.scale;
            }
        }
    }
}

// The distance of rows in a buffer: an odd number of lines, so that rows do not share the sets of a cache.
inline int64_t buffer_stride(const PackedLinear &job) { return (job.in * job.bits / 8 / LINE | 1) * LINE + LINE * 2; }

// Copies rows of codes to a buffer, in the order of the memory.
struct Reader {
    const uint8_t *from, *end;
    uint8_t *to;
    int64_t pieces, gap, at;  // of a row; between rows in the buffer; the next piece of the row

    Reader(const PackedLinear &job, int64_t n, int64_t end_row, uint8_t *to)
        : from(job.packed + n * pieces_of(job) * PIECE), end(job.packed + end_row * pieces_of(job) * PIECE), to(to),
          pieces(pieces_of(job)), gap(buffer_stride(job) - pieces * PIECE), at(0) {}

    INLINE void read(int64_t count) {
        while (count > 0 && from < end) {
            const int64_t some = std::min(count, pieces - at);
            int64_t i = 0;
            for (; i + 2 <= some; i += 2, from += LINE, to += LINE) {
                __builtin_prefetch(from + AHEAD);
                _mm512_storeu_si512(to, load_line(from));
            }
            for (; i < some; ++i, from += PIECE, to += PIECE)
                _mm256_storeu_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
            count -= some;
            at += some;
            if (at == pieces) at = 0, to += gap;
        }
    }
};

// Transposes a piece of 16 rows: vector i of the result has dword i of each row. The work is in eight parts, to be done
// between the products of the previous piece: as a whole, it would leave the units for products without work.
struct Transposer {
    const uint8_t *piece;
    int64_t stride;
    __m512i *to;
    __m512i part[4], fours[2][4];

    // The pieces of a row and of the fourth row after it.
    INLINE __m512i pair(int64_t row) const {
        const __m512i first = _mm512_castsi256_si512(raw<__m256i>(piece + row * stride));
        return _mm512_mask_broadcast_i64x4(first, 0xf0, raw<__m256i>(piece + (row + 4) * stride));
    }

    INLINE void work(int i) {
        if (i == 0 || i == 2) {
            const __m512i a = pair(4 * i), b = pair(4 * i + 1), c = pair(4 * i + 2), d = pair(4 * i + 3);
            part[0] = _mm512_unpacklo_epi32(a, b);
            part[1] = _mm512_unpacklo_epi32(c, d);
            part[2] = _mm512_unpackhi_epi32(a, b);
            part[3] = _mm512_unpackhi_epi32(c, d);
        } else if (i == 1 || i == 3) {
            fours[i / 2][0] = _mm512_unpacklo_epi64(part[0], part[1]);
            fours[i / 2][1] = _mm512_unpackhi_epi64(part[0], part[1]);
            fours[i / 2][2] = _mm512_unpacklo_epi64(part[2], part[3]);
            fours[i / 2][3] = _mm512_unpackhi_epi64(part[2], part[3]);
        } else {
            const int n = i - 4;
            to[n] = _mm512_shuffle_i32x4(fours[0][n], fours[1][n], 0x88);
            to[4 + n] = _mm512_shuffle_i32x4(fours[0][n], fours[1][n], 0xdd);
        }
    }
};

// The scales and minimums of a chunk for strips of W, what belongs to the rows of a block of x, and the totals of both
// with the distance of their rows.
struct Around {
    const float *scales, *minimums, *sums, *x_scales;
    float *totals;
    int64_t width;
};

// Add the sums of a chunk to the totals.
template <class Kind, int X, int STRIPS>
INLINE void add_scaled(const typename Kind::Sum (&sum)[X][STRIPS], const Around &around) {
    UNROLLED
    for (int strip = 0; strip < STRIPS; ++strip) {
        const Vec scale = load(around.scales + strip * STRIP), minimum = load(around.minimums + strip * STRIP);
        UNROLLED
        for (int m = 0; m < X; ++m) {
            float *to = around.totals + m * around.width + strip * STRIP;
            const Vec both = Kind::ROUNDED ? scale * splat(around.x_scales[m]) : scale;
            const Vec total = fma(minimum, splat(around.sums[m]), load(to));
            store(to, fma(Kind::number(sum[m][strip]), both, total));
        }
    }
}

// The codes of a chunk of a strip: the transposed dwords of its first piece, the place of its further pieces, and the
// first piece of the next chunk, which is transposed meanwhile.
struct Strip {
    __m512i *now, *next;
    const uint8_t *codes, *following;
    int64_t stride;
};

// Multiply a chunk of a strip with X rows of x. With `TILE`, the unpacked codes are kept in column `column` of a tile.
template <class Kind, int BITS, int X, bool TILE>
APART void add_fused(Strip &strip, const uint32_t *x, const Around &around, __m512i *tile) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    constexpr int64_t PIECES = VALUES * BITS / 8 / PIECE;
    typename Kind::Sum sum[X][1] = {};
    for (int64_t piece = 0; piece < PIECES; ++piece) {
        const uint8_t *ahead = piece + 1 < PIECES ? strip.codes + (piece + 1) * PIECE : strip.following;
        Transposer transposer{ahead, strip.stride, strip.next, {}, {}};
        UNROLLED
        for (int i = 0; i < 8; ++i) {
            __m512i w[STEPS];
            Kind::unpack(strip.now[i], w, std::integral_constant<int, BITS>());
            transposer.work(i);
            UNROLLED
            for (int step = 0; step < STEPS; ++step, x += X) {
                if (TILE) *tile = w[step], tile += 2;
                UNROLLED
                for (int m = 0; m < X; ++m) sum[m][0] = Kind::add(sum[m][0], w[step], broadcast(x + m));
            }
        }
        std::swap(strip.now, strip.next);
    }
    add_scaled<Kind, X, 1>(sum, around);
}

template <class Kind, int X>
APART void add_tile(const __m512i *tile, const uint32_t *x, const Around &around) {
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
    add_scaled<Kind, X, 2>(sum, around);
}

typedef void (*AddFused)(Strip &, const uint32_t *, const Around &, __m512i *);
typedef void (*AddTile)(const __m512i *, const uint32_t *, const Around &);

template <int MOST>
using Rows = std::make_integer_sequence<int, MOST>;

template <class Kind, int BITS, bool TILE, int... N>
inline AddFused fused_function(int64_t rows, std::integer_sequence<int, N...>) {
    constexpr AddFused functions[] = {add_fused<Kind, BITS, N + 1, TILE>...};
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

// The first block of rows of x is multiplied with codes that are unpacked meanwhile, the others with the tile.
template <class Kind, int BITS, int STRIPS>
TARGET void multiply_strips(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t WIDTH = STRIPS * STRIP, CHUNK_BYTES = VALUES * BITS / 8, STEPS = chunk_steps<Kind>;
    const int64_t chunks = chunks_of(job), stride = padded(chunks), blocks = blocks_of(job);
    const int64_t distance = buffer_stride(job), buffer_bytes = WIDTH * distance, tile_bytes = STEPS * 2 * LINE;
    static thread_local std::vector<float> room;
    uint8_t *buffers = (uint8_t *)aligned(room, (2 * buffer_bytes + tile_bytes) / (int64_t)sizeof(float) +
                                                    job.rows * WIDTH + 2 * chunks * WIDTH + 2 * stride * STRIP);
    uint8_t *now = buffers, *next = buffers + buffer_bytes;
    __m512i *tile = (__m512i *)(next + buffer_bytes), dwords[STRIPS][2][8];
    float *totals = (float *)((uint8_t *)tile + tile_bytes), *scales = totals + job.rows * WIDTH;
    float *minimums = scales + chunks * WIDTH, *row = minimums + chunks * WIDTH;
    const int64_t first = block_begin(job, 1, blocks);
    const AddFused add = fused_function<Kind, BITS, STRIPS == 2>(first, Rows<STRIPS == 1 ? MOST_FUSED : MOST_TILED>());
    Reader(job, begin, end, now).read(WIDTH * pieces_of(job));
    Strip strips[STRIPS];
    for (int s = 0; s < STRIPS; ++s) {
        strips[s] = {dwords[s][0], dwords[s][1], nullptr, nullptr, distance};
        Transposer transposer{now + s * STRIP * distance, distance, strips[s].now, {}, {}};
        for (int i = 0; i < 8; ++i) transposer.work(i);
    }
    for (int64_t n = begin; n < end; n += WIDTH, std::swap(now, next)) {
        const int64_t count = std::min(WIDTH, end - n);
        strip_scales<Kind, BITS>(job, n, count, WIDTH, row, scales, minimums);
        std::fill_n(totals, job.rows * WIDTH, 0.0f);
        Reader reader(job, n + count, end, next);
        for (int64_t c = 0; c < chunks; ++c) {
            reader.read(CHUNK_BYTES / PIECE * WIDTH);
            const uint32_t *x = (const uint32_t *)job.operand + c * job.rows * STEPS;
            Around around{scales + c * WIDTH, minimums + c * WIDTH, job.sums + c * job.rows,
                          job.x_scales + c * job.rows, totals, WIDTH};
            for (int s = 0; s < STRIPS; ++s) {
                Strip &strip = strips[s];
                strip.codes = now + s * STRIP * distance + c * CHUNK_BYTES;
                strip.following = c + 1 < chunks ? strip.codes + CHUNK_BYTES : next + s * STRIP * distance;
                Around own = around;
                own.scales += s * STRIP;
                own.minimums += s * STRIP;
                own.totals += s * STRIP;
                add(strip, x, own, tile + s);
            }
            for (int64_t block = 1; block < blocks; ++block) {
                const int64_t m = block_begin(job, block, blocks), rows = block_begin(job, block + 1, blocks) - m;
                Around own = around;
                own.sums += m;
                own.x_scales += m;
                own.totals += m * WIDTH;
                tile_function<Kind>(rows, Rows<MOST_TILED>())(tile, x + m * STEPS, own);
            }
        }
        for (int64_t m = 0; m < job.rows; ++m)
            for (int64_t at = 0; at < count; at += STRIP)
                write_outputs(job, load(totals + m * WIDTH + at), m, n + at, std::min(STRIP, count - at));
    }
}

}  // namespace dots
}  // namespace VARIANT
