// Rows of x for products with strips, 16 rows of W at a time. A vector has one operand of each of the rows of a strip, so
// the scales of the rows are vectors too and the sums need no shuffles. The codes are unpacked while they are multiplied
// (fused.h), or once for all rows of x, before (panels.h); methods.h chooses.
#pragma once

#include <utility>

namespace VARIANT {
namespace dots {

constexpr int64_t STRIP = LANES;  // rows
constexpr int64_t PIECE = 32;  // bytes: 8 dwords

// Rows of x with all sums in registers: those of a strip, and those of two strips together with their totals.
constexpr int MOST_FUSED = 16, MOST_SCALED = 7;

// The number of blocks of rows of x, and the first row of each; they differ by one row at most.
inline int64_t blocks_of(const PackedLinear &job) {
    const int64_t most = method_of(job) == Method::strips ? MOST_FUSED : MOST_SCALED;
    return (job.rows + most - 1) / most;
}
inline int64_t block_begin(const PackedLinear &job, int64_t block, int64_t blocks) { return job.rows * block / blocks; }

// x: for each block and chunk, the steps (steps, rows of the block). `sums` and `x_scales`: for each block, (chunks, rows
// of the block).
template <class Kind>
void prepare_strips(PackedLinear &job) {
    const int64_t count = job.rows * chunks_of(job), values = count * chunk_steps<Kind>;
    float *room = aligned(job.wide, values + 2 * count);
    job.operand = room;
    job.sums = room + values;
    job.x_scales = job.sums + count;
    job.parts = blocks_of(job);
}

// Fill the layout of `prepare_strips` for some blocks.
template <class Kind, int BITS>
TARGET void order_strips(const PackedLinear &job, int64_t first, int64_t last) {
    const int64_t chunks = chunks_of(job), blocks = blocks_of(job), each = chunk_steps<Kind>;
    Ordered ordered[LANES] = {};
    constexpr int64_t distance = sizeof(Ordered) / sizeof(float);
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block_begin(job, block, blocks), rows = block_begin(job, block + 1, blocks) - begin;
        const auto mask = (__mmask16)((1u << rows) - 1);
        float *to = (float *)job.operand + begin * chunks * each;
        float *sums = (float *)job.sums + begin * chunks, *scales = (float *)job.x_scales + begin * chunks;
        for (int64_t c = 0; c < chunks; ++c, sums += rows, scales += rows) {
            for (int64_t m = 0; m < rows; ++m) {
                order_chunk<BITS>(job, begin + m, c, ordered[m], Kind());
                sums[m] = ordered[m].sum;
                scales[m] = ordered[m].scale;
            }
            for (int64_t step = 0; step < each; step += LANES) {
                Vec columns[LANES];
                transpose((const float *)ordered[0].steps + step, distance, columns);
                for (const Vec &column : columns) {
                    _mm512_mask_storeu_ps(to, mask, column);
                    to += rows;
                }
            }
        }
    }
}

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

// What the sums of a chunk are multiplied with: the scales and minimums of strips of W, and the sums and scales of the rows
// of a block of x.
struct Scaling {
    const float *scales, *minimums, *sums, *x_scales;
};

// The scales and minimums of the `count` rows from `n` as (chunks, width) in float32, with zeros beyond them. `row` has
// space for two strides of a strip.
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
            Vec columns[LANES];
            transpose(row + c, 2 * stride, columns);
            for (int64_t i = 0; i < some; ++i) store(scales + (c + i) * width + strip, columns[i]);
            transpose(row + stride + c, 2 * stride, columns);
            for (int64_t i = 0; i < some; ++i) store(minimums + (c + i) * width + strip, columns[i]);
        }
    }
}

template <int MOST>
using Rows = std::make_integer_sequence<int, MOST>;

}  // namespace dots
}  // namespace VARIANT
