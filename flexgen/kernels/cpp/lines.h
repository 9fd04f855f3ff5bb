// Products of one row of x with group-wise integers: each row of W is one stream of codes. Several streams of one page
// would mislead the prefetchers of some processors, which then read at half of the speed. The exception is a long x, which
// takes much of the L1 cache. With four bits, it is multiplied with two adjacent rows of W at once: x is loaded half as often.
#pragma once

namespace VARIANT {
namespace dots {

constexpr int64_t AHEAD = 8192;  // bytes from a line to the one that is prefetched: to the L2 cache, because the L1 cache can
                                 // wait for few lines at a time
constexpr int AT_ONCE = 4;  // lines that are multiplied at once
constexpr int64_t LONG_X = 4096;  // values of x, which take a quarter of an L1 cache in bfloat16

// A line of codes: two chunks of four bits, or one of eight.
template <int BITS>
constexpr int64_t line_chunks = BITS == 4 ? 2 : 1;

inline int64_t lines_of(const PackedLinear &job) { return (job.in * job.bits / 8 + LINE - 1) / LINE; }

// Put a chunk of x in the order of `unpack_line`, with LANES dwords between its operands.
template <int BITS>
INLINE void order_line(const PackedLinear &job, int64_t c, const Ordered &, uint32_t *to, Pairs) {
    const Bf16 *x = (const Bf16 *)job.x;
    const Places at = places(job, c);
    for (int64_t octet = 0; octet < VALUES / 8; ++octet) {  // of consecutive values
        const int64_t half = octet / 4, lane = BITS == 8 ? octet / 2 : octet % 4 / 2;
        const int64_t operand = BITS == 8 ? octet % 2 : 2 * half + octet % 2;
        memcpy(to + operand * LANES + 4 * lane, x + (half ? at.second : at.first) + octet % 4 * 8, 8 * sizeof(Bf16));
    }
}
template <int BITS>
INLINE void order_line(const PackedLinear &, int64_t, const Ordered &chunk, uint32_t *to, Bytes) {
    constexpr int STEPS = steps_of<Bytes, BITS>;
    for (int64_t step = 0; step < chunk_steps<Bytes>; ++step) to[step % STEPS * LANES + step / STEPS] = chunk.steps[step];
}

// x: for each line, a vector for each operand of its codes. `sums`: of the chunks, padded. `x_scales`: for each line, the
// scale of each dword.
template <class Kind, int BITS>
TARGET void prepare_line(PackedLinear &job) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    constexpr int64_t DWORDS = VALUES * BITS / 32;
    const int64_t chunks = chunks_of(job), lines = lines_of(job), width = lines * STEPS * LANES;
    const int64_t line_scales = Kind::ROUNDED ? lines * LANES : 0;
    float *room = aligned(job.wide, width + line_scales + padded(chunks));
    // What is beyond the last chunk is multiplied with zeros.
    std::fill_n(room, width + line_scales + padded(chunks), 0.0f);
    uint32_t *operand = (uint32_t *)room;
    float *scales = room + width, *sums = scales + line_scales;
    Ordered chunk;
    for (int64_t c = 0; c < chunks; ++c) {
        order_chunk<BITS>(job, 0, c, chunk, Kind());
        const int64_t line = c / line_chunks<BITS>, lane = c % line_chunks<BITS> * DWORDS;
        order_line<BITS>(job, c, chunk, operand + line * STEPS * LANES + lane, Kind());
        if (Kind::ROUNDED) std::fill_n(scales + line * LANES + lane, DWORDS, chunk.scale);
        sums[c] = chunk.sum;
    }
    job.operand = operand;
    job.x_scales = scales;
    job.sums = sums;
}

// The scale of each dword of a line.
template <int BITS>
INLINE Vec line_scale(const float *scales, int64_t line) {
    if (BITS == 8) return splat(scales[line]);
    return _mm512_mask_broadcastss_ps(splat(scales[2 * line]), 0xff00, _mm_load_ss(scales + 2 * line + 1));
}

// Add the products of LINES lines of ROWS rows to their totals from FIRST on. A product waits several cycles for the
// previous one of its sum, and a processor looks only a few lines ahead, so consecutive products belong to different sums.
template <class Kind, int BITS, int FIRST, int ROWS, int LINES, int TOTALS>
INLINE void add_lines(const __m512i (&codes)[ROWS][LINES], const uint32_t *x, const float *const (&scales)[ROWS],
                      const float *x_scales, int64_t line, Vec (&total)[ROWS][TOTALS]) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    __m512i w[ROWS][LINES][STEPS];
    typename Kind::Sum sum[ROWS][LINES] = {};
    x += line * STEPS * LANES;
    UNROLLED
    for (int r = 0; r < ROWS; ++r) {
        UNROLLED
        for (int n = 0; n < LINES; ++n) Kind::unpack_line(codes[r][n], w[r][n], std::integral_constant<int, BITS>());
    }
    UNROLLED
    for (int step = 0; step < STEPS; ++step) {
        UNROLLED
        for (int n = 0; n < LINES; ++n) {
            const __m512i values = load_line(x + (n * STEPS + step) * LANES);
            UNROLLED
            for (int r = 0; r < ROWS; ++r) sum[r][n] = Kind::add(sum[r][n], w[r][n][step], values);
        }
    }
    UNROLLED
    for (int n = 0; n < LINES; ++n) {
        UNROLLED
        for (int r = 0; r < ROWS; ++r) {
            const Vec scale = line_scale<BITS>(scales[r], line + n);
            const Vec both = Kind::ROUNDED ? scale * load(x_scales + (line + n) * LANES) : scale;
            total[r][FIRST + n] = fma(Kind::number(sum[r][n]), both, total[r][FIRST + n]);
        }
    }
}

// Each row of scales is a short run of its own, which a processor does not prefetch early enough.
INLINE void prefetch_scales(const PackedLinear &job, int64_t row) {
    const int64_t bytes = job.groups() * (int64_t)sizeof(Half);
    for (int64_t at = row * bytes; at < (row + 1) * bytes; at += LINE) {
        __builtin_prefetch((const uint8_t *)job.scales + at);
        __builtin_prefetch((const uint8_t *)job.minimums + at);
    }
}

// Add the products of the next LINES lines of each row to its totals from FIRST on.
template <class Kind, int BITS, int FIRST, int LINES, int ROWS>
INLINE void multiply_next(const PackedLinear &job, const uint8_t *codes, const float *const (&scales)[ROWS],
                          int64_t line, Vec (&total)[ROWS][AT_ONCE]) {
    const int64_t bytes = job.in * BITS / 8;
    __m512i some[ROWS][LINES];
    UNROLLED
    for (int r = 0; r < ROWS; ++r) {
        UNROLLED
        for (int i = 0; i < LINES; ++i) {
            const uint8_t *at = codes + r * bytes + (line + i) * LINE;
            __builtin_prefetch(at + AHEAD, 0, 2);
            some[r][i] = kept(load_line(at));
        }
    }
    add_lines<Kind, BITS, FIRST>(some, (const uint32_t *)job.operand, scales, job.x_scales, line, total);
}

// Write the products of ROWS adjacent rows of W to `sums`: a vector for each row, whose lanes the caller adds up. The
// results do not depend on ROWS. `codes`: where the first row begins. `every`: the scales and the minimums of each row.
template <class Kind, int BITS, int ROWS>
INLINE void multiply_adjacent(const PackedLinear &job, const uint8_t *codes, const float *every, Vec *sums) {
    const int64_t stride = padded(chunks_of(job)), bytes = job.in * BITS / 8, lines = lines_of(job);
    const uint32_t *x = (const uint32_t *)job.operand;
    const float *scales[ROWS];
    Vec total[ROWS][AT_ONCE] = {};
    UNROLLED
    for (int r = 0; r < ROWS; ++r) scales[r] = every + 2 * r * stride;
    int64_t line = 0;
    for (; (line + AT_ONCE) * LINE <= bytes; line += AT_ONCE) {
        if constexpr (ROWS == 1) {
            multiply_next<Kind, BITS, 0, AT_ONCE>(job, codes, scales, line, total);
        } else {
            multiply_next<Kind, BITS, 0, AT_ONCE / 2>(job, codes, scales, line, total);
            multiply_next<Kind, BITS, AT_ONCE / 2, AT_ONCE / 2>(job, codes, scales, line + AT_ONCE / 2, total);
        }
    }
    UNROLLED
    for (int r = 0; r < ROWS; ++r) {
        const uint8_t *own = codes + r * bytes;
        const float *const own_scales[] = {scales[r]};
        Vec rest[1][1] = {};
        for (int64_t c = 0; c < stride; c += LANES)
            rest[0][0] = fma(load(scales[r] + stride + c), load(job.sums + c), rest[0][0]);
        int64_t left = line;
        if ((left + 2) * LINE <= bytes) {
            const __m512i some[1][2] = {{load_line(own + left * LINE), load_line(own + (left + 1) * LINE)}};
            Vec two[1][2] = {};
            add_lines<Kind, BITS, 0>(some, x, own_scales, job.x_scales, left, two);
            rest[0][0] += two[0][0] + two[0][1];
            left += 2;
        }
        for (; left < lines; ++left) {
            const bool all = (left + 1) * LINE <= bytes;
            const __m512i some[1][1] = {
                {all ? load_line(own + left * LINE) : _mm512_zextsi256_si512(raw<__m256i>(own + left * LINE))}};
            add_lines<Kind, BITS, 0>(some, x, own_scales, job.x_scales, left, rest);
        }
        sums[r] = rest[0][0];
        UNROLLED
        for (int i = 0; i < AT_ONCE; ++i) sums[r] += total[r][i];
    }
}

template <class Kind, int BITS>
APART void multiply_lines(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t stride = padded(chunks_of(job)), bytes = job.in * BITS / 8;
    static thread_local std::vector<float> room;
    float *every = aligned(room, LANES * 2 * stride);
    Vec sums[LANES] = {};
    for (int64_t n = begin; n < end; n += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - n);
        // First, so that the products of a row need not wait for them.
        for (int64_t k = 0; k < count; ++k)
            chunk_scales<Kind, BITS>(job, n + k, every + 2 * k * stride, every + (2 * k + 1) * stride);
        for (int64_t k = 0, rows; k < count; k += rows) {
            const uint8_t *codes = job.packed + (n + k) * bytes;
            const float *own = every + 2 * k * stride;
            rows = BITS == 4 && job.in > LONG_X && k + 1 < count ? 2 : 1;
            for (int64_t row = 0; row < rows; ++row) prefetch_scales(job, n + k + row + LANES);
            if (BITS == 4 && rows == 2) multiply_adjacent<Kind, BITS, 2>(job, codes, own, sums + k);
            else multiply_adjacent<Kind, BITS, 1>(job, codes, own, sums + k);
        }
        write_outputs(job, VARIANT::sums(sums), 0, n, count);
    }
}

}  // namespace dots
}  // namespace VARIANT
