// Products of many rows of x in bfloat16, by outer products. The lanes of a vector are LANES rows of x, and each pair of
// values of W is multiplied with all of them. A tile is OUTER_WEIGHTS rows of W times PANEL_ROWS rows of x. Its sums need
// no shuffles until the result is written.
//
// A depth is up to OUTER_BYTES of each row; a band of W is multiplied one depth after the other (Goto and van de Geijn,
// "Anatomy of high-performance matrix multiplication", 2008). A panel of x stays in the L2 cache for all tiles of a band.
// Rows of W often share the sets of the L1 cache, which have eight ways, so they are copied to rows with a pitch
// that is not a power of two. The tiles of a band copy the next band between their products, a line at a time, which hides
// the time to read it.
#pragma once

namespace VARIANT {
namespace linear {

constexpr int OUTER_WEIGHTS = 14, OUTER_VECTORS = 2;  // with all sums in registers
constexpr int64_t PANEL_ROWS = OUTER_VECTORS * LANES;  // of x
constexpr int64_t OUTER_BYTES = 2048, OUTER_PITCH = OUTER_BYTES + LINE, OUTER_TILE_BYTES = OUTER_WEIGHTS * OUTER_PITCH;
constexpr int64_t OUTER_TILES = 4, OUTER_BAND = OUTER_TILES * OUTER_WEIGHTS;  // the most tiles and rows of a band
constexpr int64_t LINE_VALUES = LINE / sizeof(Bf16), LINE_PAIRS = LINE_VALUES / 2;
static_assert(OUTER_VECTORS == 2, "a panel has one or two vectors");
static_assert(OUTER_WEIGHTS <= LINE_PAIRS, "a row is copied while a share 1 / LINE_PAIRS of the steps is multiplied");

// The layout of x: for each depth, panels of up to PANEL_ROWS rows, in whole vectors. A panel has the first pair of values
// of all its rows, then the second pair, and so on. Rows end with zeros up to a whole line. All depths have nearly the same
// size.
struct OuterOperand {
    int64_t lines, depths, vectors, panels;  // lines: of a row
    bool half;  // whether at most half of the last vector is used

    explicit OuterOperand(const PackedLinear &job)
        : lines((job.in + LINE_VALUES - 1) / LINE_VALUES), depths((lines * LINE + OUTER_BYTES - 1) / OUTER_BYTES),
          vectors((job.rows + LANES - 1) / LANES), panels((vectors + OUTER_VECTORS - 1) / OUTER_VECTORS),
          half((job.rows - 1) % LANES < LANES / 2) {}

    int64_t first_line(int64_t d) const { return lines * d / depths; }
    int64_t depth_lines(int64_t d) const { return first_line(d + 1) - first_line(d); }
    int64_t panel_vectors(int64_t panel) const { return std::min<int64_t>(OUTER_VECTORS, vectors - panel * OUTER_VECTORS); }
    // The index of the first pair of a panel.
    int64_t place(int64_t d, int64_t panel) const {
        return (first_line(d) * vectors + panel * OUTER_VECTORS * depth_lines(d)) * LINE_PAIRS * LANES;
    }
    int64_t size() const { return lines * vectors * LINE_PAIRS * LANES; }
};

// Lines of rows of W to copy, up to OUTER_WEIGHTS rows.
struct RowCopy {
    const uint8_t *from;
    int64_t stride;
    uint8_t *to;  // with OUTER_PITCH
    int64_t rows, lines;
    const uint8_t *after;  // the row that is copied after the last one
};

INLINE void copy_line(const uint8_t *from, uint8_t *to) { _mm512_store_si512(to, _mm512_loadu_si512(from)); }

// Copy the lines from `first` on.
TARGET inline void copy_lines(const RowCopy &copy, int64_t first) {
    for (int64_t k = 0; k < copy.rows; ++k)
        for (int64_t i = first; i < copy.lines; ++i)
            copy_line(copy.from + k * copy.stride + i * LINE, copy.to + k * OUTER_PITCH + i * LINE);
}

// Multiply `lines` lines of OUTER_WEIGHTS rows of W with FULL vectors of rows of x, and with half a vector after them if
// HALF. Add the products to `totals` (OUTER_WEIGHTS, vectors * LANES), or set them. Meanwhile, copy at most `lines` lines of
// each row of `copy`, a line for each pair of values, and prefetch the second row after it: one row before it is copied is
// too late if memory is slow.
template <int FULL, bool HALF>
APART void multiply_outer(const uint8_t *w, const Bf16 *x, int64_t lines, float *totals, bool add, const RowCopy &copy) {
    constexpr int V = FULL + HALF, SOME = FULL ? FULL : 1;
    Vec sum[OUTER_WEIGHTS][SOME];
    __m256 half[OUTER_WEIGHTS];
    UNROLLED
    for (int n = 0; n < OUTER_WEIGHTS; ++n) {
        for (int v = 0; v < FULL; ++v) sum[n][v] = add ? load(totals + (n * V + v) * LANES) : Vec{};
        if (HALF) half[n] = add ? _mm256_loadu_ps(totals + (n * V + FULL) * LANES) : _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < LINE_PAIRS; ++k) {
        const int64_t copied = k < copy.rows ? copy.lines : 0;
        const uint8_t *from = copy.from + k * copy.stride;
        const uint8_t *next = k + 2 < copy.rows ? from + 2 * copy.stride : copy.after + (k + 2 - copy.rows) * copy.stride;
        uint8_t *to = copy.to + k * OUTER_PITCH;
        for (int64_t i = 0; i < lines; ++i, w += 2 * sizeof(Bf16), x += 2 * V * LANES) {
            if (i < copied) {
                copy_line(from + i * LINE, to + i * LINE);
                __builtin_prefetch(next + i * LINE, 0, 2);
            }
            __m512bh values[SOME];
            UNROLLED
            for (int v = 0; v < FULL; ++v) values[v] = Paired::values(x + 2 * v * LANES);
            const auto rest = (__m256bh)_mm256_loadu_si256((const __m256i *)(x + 2 * (V - 1) * LANES));
            UNROLLED
            for (int n = 0; n < OUTER_WEIGHTS; ++n) {
                const __m512i pair = _mm512_set1_epi32(raw<int>(w + n * OUTER_PITCH));
                UNROLLED
                for (int v = 0; v < FULL; ++v) sum[n][v] = Paired::add(sum[n][v], (__m512bh)pair, values[v]);
                if (HALF) half[n] = _mm256_dpbf16_ps(half[n], (__m256bh)_mm512_castsi512_si256(pair), rest);
            }
        }
    }
    UNROLLED
    for (int n = 0; n < OUTER_WEIGHTS; ++n) {
        for (int v = 0; v < FULL; ++v) store(totals + (n * V + v) * LANES, sum[n][v]);
        if (HALF) _mm256_storeu_ps(totals + (n * V + FULL) * LANES, half[n]);
    }
}

// The result for up to PANEL_ROWS rows of x, from row `m`, and `count` rows of W, from row `n`.
struct OuterOutput {
    const PackedLinear &job;
    int64_t m, n, count;

    // Prefetch the memory of the result while the products are computed.
    void prefetch() const {
        for (int64_t row = m; row < std::min(m + PANEL_ROWS, job.rows); ++row)
            for (int64_t at = 0; at < count; at += LINE_VALUES) __builtin_prefetch(place(row) + at, 1, 2);
    }

    // totals: (count, vectors * LANES)
    TARGET void write(const float *totals, int64_t vectors) const {
        constexpr int64_t WIDTH = whole(OUTER_BAND, LANES);
        float bias[WIDTH] = {};
        if (job.bias) widen((const Bf16 *)job.bias + n, bias, count);
        for (int64_t v = 0; v < vectors; ++v) {
            Bf16 found[LANES][WIDTH];
            for (int64_t at = 0; at < count; at += LANES) {
                Vec columns[LANES];
                transpose(totals + (at * vectors + v) * LANES, vectors * LANES, columns);
                for (int k = 0; k < LANES; ++k) store(found[k] + at, columns[k] + load(bias + at));
            }
            const int64_t first = m + v * LANES;
            for (int64_t k = 0; k < std::min<int64_t>(LANES, job.rows - first); ++k) {
                Bf16 *to = place(first + k);
                if (count == OUTER_WEIGHTS) memcpy(to, found[k], OUTER_WEIGHTS * sizeof(Bf16));  // of constant size
                else memcpy(to, found[k], count * sizeof(Bf16));
            }
        }
    }

private:
    Bf16 *place(int64_t row) const { return (Bf16 *)job.y + row * job.out + n; }
};

// The memory of a thread: the totals of a band with all rows of x, and two bands of W.
struct OuterRoom {
    float *totals;
    uint8_t *now, *next;

    explicit OuterRoom(const OuterOperand &operand) {
        static thread_local std::vector<float> room;
        constexpr int64_t BAND = OUTER_TILES * OUTER_TILE_BYTES;
        // Whole vectors of totals are transposed, also where a band has fewer rows.
        const int64_t sums = (operand.vectors * OUTER_BAND + PANEL_ROWS) * LANES;
        totals = aligned(room, sums + 2 * BAND / sizeof(float));
        now = (uint8_t *)(totals + sums);
        next = now + BAND;
    }
};

// Multiply rows `begin` to `end` of W with all rows of x.
TARGET inline void multiply_by_outer(const PackedLinear &job, int64_t begin, int64_t end) {
    const OuterOperand operand(job);
    OuterRoom room(operand);
    const bool whole_lines = job.in % LINE_VALUES == 0;  // otherwise, lines of W are not copied while others are multiplied
    const int64_t row_bytes = job.in * sizeof(Bf16), tiles = (end - begin + OUTER_WEIGHTS - 1) / OUTER_WEIGHTS;
    // The copy of a tile of rows of W from row `n`, at depth `d`.
    const auto copy_of = [&](int64_t n, int64_t d, uint8_t *to) {
        const uint8_t *from = job.packed + n * row_bytes + operand.first_line(d) * LINE;
        const int64_t rows = std::clamp<int64_t>(job.out - n, 0, OUTER_WEIGHTS);
        const uint8_t *after = n + rows < job.out ? from + rows * row_bytes : from;
        return RowCopy{from, row_bytes, to, rows, operand.depth_lines(d), after};
    };
    // The first band has one tile, because nothing is multiplied while its first depth is copied.
    const int64_t most = std::min(OUTER_TILES, operand.panels);
    for (int64_t tile = 0, count = 1, next_count; tile < tiles; tile += count, count = next_count) {
        const int64_t n = begin + tile * OUTER_WEIGHTS, rows = std::min(count * OUTER_WEIGHTS, end - n);
        next_count = std::clamp<int64_t>(tiles - tile - count, 1, most);
        for (int64_t d = 0; d < operand.depths; ++d) {
            const int64_t lines = operand.depth_lines(d), at = operand.first_line(d) * LINE_VALUES;
            const bool last = d + 1 == operand.depths;
            if (!whole_lines) {
                const int64_t values = std::min(lines * LINE_VALUES, job.in - at);
                for (int64_t k = 0; k < rows; ++k) fill(job, n + k, at, values, (Bf16 *)(room.now + k * OUTER_PITCH));
            } else if (tile == 0 && d == 0) {
                copy_lines(copy_of(n, 0, room.now), 0);
            }
            // After the last depth, the next band of the thread often follows.
            const int64_t next_n = last ? n + count * OUTER_WEIGHTS : n, next_d = last ? 0 : d + 1;
            const int64_t copied = !whole_lines ? 0 : last ? next_count : count;
            for (int64_t panel = 0, done = 0; panel < operand.panels; ++panel) {
                const int64_t vectors = operand.panel_vectors(panel);
                const Bf16 *x = (const Bf16 *)job.operand + 2 * operand.place(d, panel);
                const OuterOutput output = {job, panel * PANEL_ROWS, n, rows};
                float *totals = room.totals + panel * PANEL_ROWS * OUTER_BAND;
                if (last) output.prefetch();
                for (int64_t t = 0; t < count; ++t, ++done) {
                    RowCopy copy = {};
                    if (done < copied)
                        copy = copy_of(next_n + done * OUTER_WEIGHTS, next_d, room.next + done * OUTER_TILE_BYTES);
                    const uint8_t *w = room.now + t * OUTER_TILE_BYTES;
                    float *to = totals + t * OUTER_WEIGHTS * vectors * LANES;
                    if (operand.half && panel + 1 == operand.panels) {
                        if (vectors == OUTER_VECTORS) multiply_outer<1, true>(w, x, lines, to, d > 0, copy);
                        else multiply_outer<0, true>(w, x, lines, to, d > 0, copy);
                    } else {
                        if (vectors == OUTER_VECTORS) multiply_outer<2, false>(w, x, lines, to, d > 0, copy);
                        else multiply_outer<1, false>(w, x, lines, to, d > 0, copy);
                    }
                    copy_lines(copy, lines);  // the next depth may have more lines
                }
                if (last) output.write(totals, vectors);
            }
            if (whole_lines) std::swap(room.now, room.next);
        }
    }
}

inline void prepare_outer(PackedLinear &job) {
    const OuterOperand operand(job);
    job.tiled = true;
    job.block = OUTER_WEIGHTS;
    job.piece = 4 * OUTER_BAND;
    job.operand = aligned(job.wide, operand.size());
    job.parts = operand.vectors;
}

// Fill the layout of x for some vectors of rows.
TARGET inline void order_outer(const PackedLinear &job, int64_t first, int64_t last) {
    const OuterOperand operand(job);
    for (int64_t vector = first; vector < last; ++vector) {
        const int64_t panel = vector / OUTER_VECTORS, step = operand.panel_vectors(panel) * LANES;
        const int64_t m = vector * LANES, rows = std::min<int64_t>(LANES, job.rows - m);
        Bf16 values[LANES][LINE_VALUES] = {};
        for (int64_t d = 0; d < operand.depths; ++d) {
            float *to = (float *)job.operand + operand.place(d, panel) + vector % OUTER_VECTORS * LANES;
            for (int64_t line = operand.first_line(d); line < operand.first_line(d + 1); ++line) {
                const int64_t at = line * LINE_VALUES, count = std::min(LINE_VALUES, job.in - at);
                for (int64_t k = 0; k < rows; ++k) {
                    const Bf16 *from = (const Bf16 *)job.x + (m + k) * job.in + at;
                    if (count == LINE_VALUES) memcpy(values[k], from, LINE);  // of constant size
                    else std::fill(std::copy_n(from, count, values[k]), values[k] + LINE_VALUES, Bf16{0});
                }
                Vec pairs[LANES];
                transpose((const float *)values, LINE_PAIRS, pairs);
                for (const Vec &pair : pairs) {
                    store(to, pair);
                    to += step;
                }
            }
        }
    }
}

}  // namespace linear
}  // namespace VARIANT
