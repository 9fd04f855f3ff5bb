// Products of up to MOST_FUSED rows of x with group-wise integers. The unpacked codes stay in registers.
//
// While the codes of a strip are multiplied, those of the next one are read in the order of the memory and put into a
// buffer, by pieces of 32 bytes, in the order of use. Reading 16 rows in step misleads prefetchers, and rows of a large
// power of two share the sets of a cache.
#pragma once

namespace VARIANT {
namespace dots {

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

// The codes of a chunk of a strip: the transposed dwords of its first piece, the place of its further pieces, and the
// first piece of the next chunk, which is transposed meanwhile.
struct Strip {
    __m512i *now, *next;
    const uint8_t *codes, *following;
    int64_t stride;
};

// The independent sums of a row of x: a sum has to wait for the previous one, which takes several cycles.
constexpr int fused_chains(int x) { return x <= 3 ? 4 : x <= 8 ? 2 : 1; }

// Multiply a chunk of a strip with X rows of x, and add the products to `totals` (X, STRIP).
template <class Kind, int BITS, int X>
APART void add_fused(Strip &strip, const uint32_t *x, const Scaling &scaling, float *totals) {
    constexpr int STEPS = steps_of<Kind, BITS>;
    constexpr int64_t PIECES = VALUES * BITS / 8 / PIECE;
    constexpr int CHAINS = fused_chains(X);
    typename Kind::Sum sum[CHAINS][X] = {};
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
                UNROLLED
                for (int m = 0; m < X; ++m) {
                    typename Kind::Sum &to = sum[(i * STEPS + step) % CHAINS][m];
                    to = Kind::add(to, w[step], broadcast(x + m));
                }
            }
        }
        std::swap(strip.now, strip.next);
    }
    const Vec scale = load(scaling.scales), minimum = load(scaling.minimums);
    const float *sums = scaling.sums, *x_scales = scaling.x_scales;
    UNROLLED
    for (int m = 0; m < X; ++m) {
        UNROLLED
        for (int chain = 1; chain < CHAINS; ++chain) sum[0][m] = Kind::both(sum[0][m], sum[chain][m]);
        const Vec both = Kind::ROUNDED ? scale * splat(x_scales[m]) : scale;
        const Vec total = fma(minimum, splat(sums[m]), load(totals + m * STRIP));
        store(totals + m * STRIP, fma(Kind::number(sum[0][m]), both, total));
    }
}

typedef void (*AddFused)(Strip &, const uint32_t *, const Scaling &, float *);

template <class Kind, int BITS, int... N>
inline AddFused fused_function(int64_t rows, std::integer_sequence<int, N...>) {
    constexpr AddFused functions[] = {add_fused<Kind, BITS, N + 1>...};
    return functions[rows - 1];
}

template <class Kind, int BITS>
TARGET void multiply_fused(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t CHUNK_BYTES = VALUES * BITS / 8, STEPS = chunk_steps<Kind>;
    const int64_t chunks = chunks_of(job), stride = padded(chunks), rows = job.rows;
    const int64_t distance = buffer_stride(job), buffer_bytes = STRIP * distance;
    static thread_local std::vector<float> room;
    uint8_t *now = (uint8_t *)aligned(room, 2 * buffer_bytes / (int64_t)sizeof(float) +
                                                STRIP * (rows + 2 * chunks + 2 * stride));
    uint8_t *next = now + buffer_bytes;
    float *totals = (float *)(next + buffer_bytes), *scales = totals + rows * STRIP;
    float *minimums = scales + chunks * STRIP, *row = minimums + chunks * STRIP;
    __m512i dwords[2][8];
    const AddFused add = fused_function<Kind, BITS>(rows, Rows<MOST_FUSED>());
    Reader(job, begin, end, now).read(STRIP * pieces_of(job));
    Strip strip{dwords[0], dwords[1], nullptr, nullptr, distance};
    Transposer transposer{now, distance, strip.now, {}, {}};
    for (int i = 0; i < 8; ++i) transposer.work(i);
    for (int64_t n = begin; n < end; n += STRIP, std::swap(now, next)) {
        const int64_t count = std::min(STRIP, end - n);
        strip_scales<Kind, BITS>(job, n, count, STRIP, row, scales, minimums);
        std::fill_n(totals, rows * STRIP, 0.0f);
        Reader reader(job, n + count, end, next);
        for (int64_t c = 0; c < chunks; ++c) {
            reader.read(CHUNK_BYTES / PIECE * STRIP);
            strip.codes = now + c * CHUNK_BYTES;
            strip.following = c + 1 < chunks ? strip.codes + CHUNK_BYTES : next;
            const Scaling scaling{scales + c * STRIP, minimums + c * STRIP, job.sums + c * rows,
                                  job.x_scales + c * rows};
            add(strip, (const uint32_t *)job.operand + c * rows * STEPS, scaling, totals);
        }
        for (int64_t m = 0; m < rows; ++m) write_outputs(job, load(totals + m * STRIP), m, n, count);
    }
}

}  // namespace dots
}  // namespace VARIANT
