// Products of many rows of x with group-wise integers.
//
// A panel is PANEL_CHUNKS chunks of two strips of W, unpacked to operands in the order of use. It is unpacked once, to the
// L2 cache, and multiplied with all rows of x, in blocks with all sums in registers. Meanwhile, the codes of the next panel
// are prefetched, each row in the order of the memory. The sums of a row of x do not depend on the division into panels.
#pragma once

namespace VARIANT {
namespace dots {

constexpr int64_t PANEL = 2 * STRIP;  // rows of W
constexpr int64_t PANEL_CHUNKS = 16;  // the maximum
constexpr int64_t BLOCK_PANELS = 2, PIECE_PANELS = 16;  // the rows of a piece of W: at least, and at most
constexpr int64_t FIRST_CHUNKS = 8;  // of the first rows of a piece of W, which were not prefetched

// The bytes of the rows of the next panel, which are prefetched line by line.
struct Ahead {
    const uint8_t *row;
    int64_t rows, stride, bytes, at;

    INLINE void fetch(int64_t lines) {
        for (; lines > 0 && rows > 0; --lines) {
            __builtin_prefetch(row + at, 0, 2);
            at += LINE;
            if (at < bytes) continue;
            at = 0;
            row += stride;
            --rows;
        }
    }
};

// Unpack `chunks` chunks of a strip, with `stride` bytes between the rows, to every second vector.
template <class Kind, int BITS>
TARGET void unpack_strip(const uint8_t *from, int64_t stride, int64_t chunks, __m512i *to) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    constexpr int64_t PIECES = VALUES * BITS / 8 / PIECE;
    for (int64_t piece = 0; piece < chunks * PIECES; ++piece, from += PIECE) {
        __m512i dwords[8];
        Transposer transposer{from, stride, dwords, {}, {}};
        UNROLLED
        for (int i = 0; i < 8; ++i) transposer.work(i);
        UNROLLED
        for (int i = 0; i < 8; ++i) {
            __m512i w[STEPS];
            Kind::unpack(dwords[i], w, std::integral_constant<int, BITS>());
            UNROLLED
            for (int step = 0; step < STEPS; ++step, to += 2) _mm512_store_si512(to, w[step]);
        }
    }
}

// Unpack chunks `c` to `c` + `chunks` of a panel, of which `count` rows from `n` exist. Memory beyond the matrix must not
// be read, so incomplete panels are copied to `codes` first.
template <class Kind, int BITS>
TARGET void unpack_panel(const PackedLinear &job, int64_t n, int64_t count, int64_t c, int64_t chunks, uint8_t *codes,
                         __m512i *to) {
    constexpr int64_t CHUNK_BYTES = VALUES * BITS / 8;
    const int64_t bytes = chunks * CHUNK_BYTES, row_bytes = job.in * BITS / 8;
    const uint8_t *from = job.packed + n * row_bytes + c * CHUNK_BYTES;
    int64_t stride = row_bytes;
    if (count < PANEL) {
        for (int64_t k = 0; k < count; ++k) memcpy(codes + k * bytes, from + k * row_bytes, bytes);
        from = codes;
        stride = bytes;
    }
    unpack_strip<Kind, BITS>(from, stride, chunks, to);
    unpack_strip<Kind, BITS>(from + STRIP * stride, stride, chunks, to + 1);
}

// Add the products of `chunks` chunks of a panel and X rows of x to `totals` (X, PANEL). The sums of each chunk are
// multiplied with scales first.
template <class Kind, int X>
APART void add_panel(const __m512i *panel, const uint32_t *x, int64_t chunks, Scaling scaling, float *totals,
                     Ahead &ahead, int64_t lines) {
    Vec total[X][2];
    UNROLLED
    for (int m = 0; m < X; ++m)
        for (int strip = 0; strip < 2; ++strip) total[m][strip] = load(totals + m * PANEL + strip * STRIP);
    for (int64_t c = 0; c < chunks; ++c) {
        ahead.fetch(lines);
        typename Kind::Sum sum[X][2] = {};
        for (int64_t step = 0; step < chunk_steps<Kind>; ++step, panel += 2, x += X) {
            const __m512i first = panel[0], second = panel[1];
            UNROLLED
            for (int m = 0; m < X; ++m) {
                const __m512i values = broadcast(x + m);
                sum[m][0] = Kind::add(sum[m][0], first, values);
                sum[m][1] = Kind::add(sum[m][1], second, values);
            }
        }
        UNROLLED
        for (int strip = 0; strip < 2; ++strip) {
            const Vec scale = load(scaling.scales + strip * STRIP);
            const Vec minimum = load(scaling.minimums + strip * STRIP);
            UNROLLED
            for (int m = 0; m < X; ++m) {
                const Vec both = Kind::ROUNDED ? scale * splat(scaling.x_scales[m]) : scale;
                total[m][strip] = fma(minimum, splat(scaling.sums[m]), total[m][strip]);
                total[m][strip] = fma(Kind::number(sum[m][strip]), both, total[m][strip]);
            }
        }
        scaling.scales += PANEL;
        scaling.minimums += PANEL;
        scaling.sums += X;
        scaling.x_scales += X;
    }
    UNROLLED
    for (int m = 0; m < X; ++m)
        for (int strip = 0; strip < 2; ++strip) store(totals + m * PANEL + strip * STRIP, total[m][strip]);
}

typedef void (*AddPanel)(const __m512i *, const uint32_t *, int64_t, Scaling, float *, Ahead &, int64_t);

template <class Kind, int... N>
inline AddPanel panel_function(int64_t rows, std::integer_sequence<int, N...>) {
    constexpr AddPanel functions[] = {add_panel<Kind, N + 1>...};
    return functions[rows - 1];
}

// The memory of a thread.
struct PanelRoom {
    __m512i *panel;  // (steps of PANEL_CHUNKS, 2)
    uint8_t *codes;  // (PANEL, bytes of PANEL_CHUNKS): of incomplete panels
    float *totals;  // (rows, PANEL)
    float *scales, *minimums;  // (chunks, PANEL)
    float *row;

    TARGET PanelRoom(const PackedLinear &job, int64_t steps, int64_t code_bytes) {
        static thread_local std::vector<float> room;
        const int64_t chunks = chunks_of(job), unpacked = PANEL_CHUNKS * steps * 2 * LANES;
        const int64_t copied = PANEL * PANEL_CHUNKS * code_bytes / (int64_t)sizeof(float);
        const int64_t scaled = chunks * PANEL;
        float *at = aligned(room, unpacked + copied + job.rows * PANEL + 2 * scaled + 2 * padded(chunks) * STRIP);
        panel = (__m512i *)at;
        codes = (uint8_t *)(at += unpacked);
        totals = at += copied;
        scales = at += job.rows * PANEL;
        minimums = at += scaled;
        row = at += scaled;
    }
};

template <class Kind, int BITS>
TARGET void multiply_panels(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t CHUNK_BYTES = VALUES * BITS / 8, STEPS = chunk_steps<Kind>;
    const int64_t chunks = chunks_of(job), blocks = blocks_of(job), row_bytes = job.in * BITS / 8;
    const int64_t lines = (PANEL * CHUNK_BYTES / LINE + blocks - 1) / blocks;  // to prefetch for each chunk and block
    const PanelRoom room(job, STEPS, CHUNK_BYTES);
    const auto ahead_of = [&](int64_t n, int64_t c, int64_t count) {
        return Ahead{job.packed + n * row_bytes + c * CHUNK_BYTES, std::min(PANEL, end - n), row_bytes,
                     count * CHUNK_BYTES, 0};
    };
    Ahead ahead = ahead_of(begin, 0, std::min(FIRST_CHUNKS, chunks));
    for (int64_t n = begin; n < end; n += PANEL) {
        const int64_t rows = std::min(PANEL, end - n), most = n == begin ? FIRST_CHUNKS : PANEL_CHUNKS;
        std::fill_n(room.totals, job.rows * PANEL, 0.0f);
        strip_scales<Kind, BITS>(job, n, rows, PANEL, room.row, room.scales, room.minimums);
        for (int64_t c = 0, count; c < chunks; c += count) {
            count = std::min(most, chunks - c);
            ahead.fetch(PANEL * count * CHUNK_BYTES / LINE);
            unpack_panel<Kind, BITS>(job, n, rows, c, count, room.codes, room.panel);
            const int64_t left = chunks - c - count;
            ahead = left ? ahead_of(n, c + count, std::min(most, left))
                         : ahead_of(n + PANEL, 0, std::min(PANEL_CHUNKS, chunks));
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t m = block_begin(job, block, blocks), x_rows = block_begin(job, block + 1, blocks) - m;
                const int64_t first = m * chunks + c * x_rows;
                const AddPanel add = panel_function<Kind>(x_rows, Rows<MOST_SCALED>());
                add(room.panel, (const uint32_t *)job.operand + first * STEPS, count,
                    {room.scales + c * PANEL, room.minimums + c * PANEL, job.sums + first, job.x_scales + first},
                    room.totals + m * PANEL, ahead, lines);
            }
        }
        for (int64_t m = 0; m < job.rows; ++m)
            for (int64_t at = 0; at < rows; at += STRIP)
                write_outputs(job, load(room.totals + m * PANEL + at), m, n + at, std::min(STRIP, rows - at));
    }
}

}  // namespace dots
}  // namespace VARIANT
