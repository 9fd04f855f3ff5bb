// Products of few rows of x with group-wise integers: each row of W is one stream of codes. Several streams of one page
// would mislead the prefetchers of some processors, which then read at half of the speed.
#pragma once

namespace VARIANT {
namespace dots {

constexpr int64_t AHEAD = 8192;  // bytes from a line to the one that is prefetched: to the L2 cache, because the L1 cache can
                                 // wait for few lines at a time
constexpr int AT_ONCE = 4;  // lines that are multiplied at once

// A line of codes: two chunks of four bits, or one of eight.
template <int BITS>
constexpr int64_t line_chunks = BITS == 4 ? 2 : 1;

inline int64_t lines_of(const PackedLinear &job) { return (job.in * job.bits / 8 + LINE - 1) / LINE; }
template <class Kind, int BITS>
inline int64_t few_width(const PackedLinear &job) {
    return lines_of(job) * steps_of<Kind, BITS> * LANES;
}

// Put a chunk of x in the order of `unpack_line`, with LANES dwords between its operands.
template <int BITS>
INLINE void order_line(const PackedLinear &job, int64_t row, int64_t c, const Ordered &, uint32_t *to, Pairs) {
    const Bf16 *x = (const Bf16 *)job.x + row * job.in;
    const Places at = places(job, c);
    for (int64_t octet = 0; octet < VALUES / 8; ++octet) {  // of consecutive values
        const int64_t half = octet / 4, lane = BITS == 8 ? octet / 2 : octet % 4 / 2;
        const int64_t operand = BITS == 8 ? octet % 2 : 2 * half + octet % 2;
        memcpy(to + operand * LANES + 4 * lane, x + (half ? at.second : at.first) + octet % 4 * 8, 8 * sizeof(Bf16));
    }
}
template <int BITS>
INLINE void order_line(const PackedLinear &, int64_t, int64_t, const Ordered &chunk, uint32_t *to, Bytes) {
    constexpr int STEPS = steps_of<Bytes, BITS>;
    for (int64_t step = 0; step < chunk_steps<Bytes>; ++step) to[step % STEPS * LANES + step / STEPS] = chunk.steps[step];
}

// x: for each row, a vector for each step of the dwords of a line. `sums`: (rows, padded chunks). `x_scales`: for each
// row and line, the scale of each dword.
template <class Kind, int BITS>
TARGET void prepare_few(PackedLinear &job) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    constexpr int64_t DWORDS = VALUES * BITS / 32;
    const int64_t chunks = chunks_of(job), stride = padded(chunks), width = few_width<Kind, BITS>(job);
    const int64_t line_scales = Kind::ROUNDED ? lines_of(job) * LANES : 0;
    float *room = aligned(job.wide, job.rows * (width + line_scales + stride));
    uint32_t *operand = (uint32_t *)room;
    float *scales = room + job.rows * width, *sums = scales + job.rows * line_scales;
    Ordered chunk;
    for (int64_t m = 0; m < job.rows; ++m) {
        for (int64_t c = 0; c < chunks; ++c) {
            order_chunk<BITS>(job, m, c, chunk, Kind());
            const int64_t line = c / line_chunks<BITS>, lane = c % line_chunks<BITS> * DWORDS;
            uint32_t *to = operand + m * width + line * STEPS * LANES + lane;
            order_line<BITS>(job, m, c, chunk, to, Kind());
            if (Kind::ROUNDED) std::fill_n(scales + m * line_scales + line * LANES + lane, DWORDS, chunk.scale);
            sums[m * stride + c] = chunk.sum;
        }
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

// Add the products of LINES lines. A product waits several cycles for the previous one of its sum, and a processor looks
// only a few lines ahead, so the sums of the lines take turns.
template <class Kind, int BITS, int X, int LINES>
INLINE void add_lines(const __m512i (&codes)[LINES], const uint32_t *x, int64_t width, const float *scales,
                      const float *x_scales, int64_t line_scales, int64_t line, Vec (&total)[LINES][X]) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    __m512i w[LINES][STEPS];
    typename Kind::Sum sum[LINES][X] = {};
    x += line * STEPS * LANES;
    UNROLLED
    for (int n = 0; n < LINES; ++n) Kind::unpack_line(codes[n], w[n], std::integral_constant<int, BITS>());
    UNROLLED
    for (int step = 0; step < STEPS; ++step) {
        UNROLLED
        for (int n = 0; n < LINES; ++n) {
            UNROLLED
            for (int m = 0; m < X; ++m)
                sum[n][m] = Kind::add(sum[n][m], w[n][step], load_line(x + m * width + (n * STEPS + step) * LANES));
        }
    }
    UNROLLED
    for (int n = 0; n < LINES; ++n) {
        const Vec scale = line_scale<BITS>(scales, line + n);
        UNROLLED
        for (int m = 0; m < X; ++m) {
            const Vec both =
                Kind::ROUNDED ? scale * load(x_scales + m * line_scales + (line + n) * LANES) : scale;
            total[n][m] = fma(Kind::number(sum[n][m]), both, total[n][m]);
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

template <class Kind, int BITS, int X>
APART void multiply_few_rows(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t stride = padded(chunks_of(job)), width = few_width<Kind, BITS>(job);
    const int64_t bytes = job.in * BITS / 8, lines = lines_of(job), line_scales = Kind::ROUNDED ? lines * LANES : 0;
    static thread_local std::vector<float> room;
    float *every = aligned(room, LANES * 2 * stride);
    const uint32_t *x = (const uint32_t *)job.operand;
    Vec sums[X][LANES] = {};
    for (int64_t n = begin; n < end; n += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - n);
        // First, so that the products of a row need not wait for them.
        for (int64_t k = 0; k < count; ++k)
            chunk_scales<Kind, BITS>(job, n + k, every + 2 * k * stride, every + (2 * k + 1) * stride);
        for (int64_t k = 0; k < count; ++k) {
            prefetch_scales(job, n + k + LANES);
            const uint8_t *codes = job.packed + (n + k) * bytes;
            const float *scales = every + 2 * k * stride, *minimums = scales + stride;
            Vec total[AT_ONCE][X] = {}, rest[1][X] = {};
            for (int64_t c = 0; c < stride; c += LANES)
                for (int m = 0; m < X; ++m)
                    total[1][m] = fma(load(minimums + c), load(job.sums + m * stride + c), total[1][m]);
            int64_t line = 0;
            for (; (line + AT_ONCE) * LINE <= bytes; line += AT_ONCE) {
                __m512i some[AT_ONCE];
                UNROLLED
                for (int64_t n = 0; n < AT_ONCE; ++n) {
                    __builtin_prefetch(codes + (line + n) * LINE + AHEAD, 0, 2);
                    some[n] = kept(load_line(codes + (line + n) * LINE));
                }
                add_lines<Kind, BITS, X>(some, x, width, scales, job.x_scales, line_scales, line, total);
            }
            for (; line < lines; ++line) {
                const bool whole = (line + 1) * LINE <= bytes;
                const __m512i some[] = {whole ? load_line(codes + line * LINE)
                                              : _mm512_zextsi256_si512(raw<__m256i>(codes + line * LINE))};
                add_lines<Kind, BITS, X>(some, x, width, scales, job.x_scales, line_scales, line, rest);
            }
            UNROLLED
            for (int m = 0; m < X; ++m) {
                Vec sum = rest[0][m];
                UNROLLED
                for (int n = 0; n < AT_ONCE; ++n) sum += total[n][m];
                sums[m][k] = sum;
            }
        }
        for (int m = 0; m < X; ++m) write_outputs(job, VARIANT::sums(sums[m]), m, n, count);
    }
}

template <class Kind, int BITS>
TARGET void multiply_few(const PackedLinear &job, int64_t begin, int64_t end) {
    static_assert(linear::INTEGERS_BY_DOTS[0].rows == 2, "");
    if (job.rows == 1) return multiply_few_rows<Kind, BITS, 1>(job, begin, end);
    multiply_few_rows<Kind, BITS, 2>(job, begin, end);
}

}  // namespace dots
}  // namespace VARIANT
