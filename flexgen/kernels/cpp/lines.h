// Products of one row of x with group-wise integers: each row of W is one stream of codes. Several streams of one page
// would mislead the prefetchers of some processors, which then read at half of the speed. With rows of 4 KiB, two streams
// that share the loads of x are 5 to 20 % slower than one.
#pragma once

namespace VARIANT {
namespace dots {

// Bytes from a line to the one that is prefetched: to the L2 cache, because the L1 cache can wait for few lines at a time.
// On an EPYC (Zen 4), int8 is read 5 % slower with 8 KiB than with 4 to 6 KiB, and int4 a third slower with 1 KiB.
constexpr int64_t AHEAD = 5120;
constexpr int AT_ONCE = 4;  // lines that are multiplied at once

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

// Add the products of LINES lines of a row to their totals. A product waits several cycles for the previous one of its sum,
// and a processor looks only a few lines ahead, so consecutive products belong to different sums.
template <class Kind, int BITS, int LINES>
INLINE void add_lines(const __m512i (&codes)[LINES], const uint32_t *x, const float *scales, const float *x_scales,
                      int64_t line, Vec (&total)[LINES]) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    __m512i w[LINES][STEPS];
    typename Kind::Sum sum[LINES] = {};
    x += line * STEPS * LANES;
    UNROLLED
    for (int n = 0; n < LINES; ++n) Kind::unpack_line(codes[n], w[n], std::integral_constant<int, BITS>());
    UNROLLED
    for (int step = 0; step < STEPS; ++step) {
        UNROLLED
        for (int n = 0; n < LINES; ++n)
            sum[n] = Kind::add(sum[n], w[n][step], load_line(x + (n * STEPS + step) * LANES));
    }
    UNROLLED
    for (int n = 0; n < LINES; ++n) {
        const Vec scale = line_scale<BITS>(scales, line + n);
        const Vec both = Kind::ROUNDED ? scale * load(x_scales + (line + n) * LANES) : scale;
        total[n] = fma(Kind::number(sum[n]), both, total[n]);
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

// The products of a row of W, in the lanes of a vector. `scales` and `minimums`: those of the row.
template <class Kind, int BITS>
INLINE Vec multiply_row(const PackedLinear &job, const uint8_t *codes, const float *scales, const float *minimums) {
    const int64_t bytes = job.in * BITS / 8, lines = lines_of(job), chunks = padded(chunks_of(job));
    const uint32_t *x = (const uint32_t *)job.operand;
    Vec total[AT_ONCE] = {};
    int64_t line = 0;
    for (; (line + AT_ONCE) * LINE <= bytes; line += AT_ONCE) {
        __m512i some[AT_ONCE];
        UNROLLED
        for (int i = 0; i < AT_ONCE; ++i) {
            const uint8_t *at = codes + (line + i) * LINE;
            __builtin_prefetch(at + AHEAD, 0, 2);
            some[i] = kept(load_line(at));
        }
        add_lines<Kind, BITS>(some, x, scales, job.x_scales, line, total);
    }
    Vec rest[1] = {};
    for (int64_t c = 0; c < chunks; c += LANES) rest[0] = fma(load(minimums + c), load(job.sums + c), rest[0]);
    if ((line + 2) * LINE <= bytes) {
        const __m512i some[2] = {load_line(codes + line * LINE), load_line(codes + (line + 1) * LINE)};
        Vec two[2] = {};
        add_lines<Kind, BITS>(some, x, scales, job.x_scales, line, two);
        rest[0] += two[0] + two[1];
        line += 2;
    }
    for (; line < lines; ++line) {
        const bool all = (line + 1) * LINE <= bytes;
        const __m512i some[1] = {
            all ? load_line(codes + line * LINE) : _mm512_zextsi256_si512(raw<__m256i>(codes + line * LINE))};
        add_lines<Kind, BITS>(some, x, scales, job.x_scales, line, rest);
    }
    UNROLLED
    for (int i = 0; i < AT_ONCE; ++i) rest[0] += total[i];
    return rest[0];
}

template <class Kind, int BITS>
APART void multiply_lines(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t stride = padded(chunks_of(job)), bytes = job.in * BITS / 8;
    static thread_local std::vector<float> room;
    float *scales = aligned(room, 2 * stride), *minimums = scales + stride;
    Vec sums[LANES] = {};
    for (int64_t n = begin; n < end; n += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - n);
        for (int64_t k = 0; k < count; ++k) {
            // Row by row: a processor converts the scales during the products of the row before. Those of LANES rows at
            // once would take 5 % of the time.
            chunk_scales<Kind, BITS>(job, n + k, scales, minimums);
            prefetch_scales(job, n + k + LANES);
            sums[k] = multiply_row<Kind, BITS>(job, job.packed + (n + k) * bytes, scales, minimums);
        }
        write_outputs(job, VARIANT::sums(sums), 0, n, count);
    }
}

}  // namespace dots
}  // namespace VARIANT
