// Products of one row of x with half types. No weight is read twice. Each row of W is read from beginning to end, in the
// order of memory, which processors prefetch best. The kinds of products are those of tiles.h.
#pragma once

namespace VARIANT {
namespace linear {

template <class Kind>
constexpr bool PAIRS = Kind::STEP > LANES;  // few operations for a line
template <class Kind>
constexpr bool WIDE = sizeof(typename Kind::X) == sizeof(float);  // x was widened before

// Independent sums for a row, because a sum takes several cycles. Those of pairs and of a wide x take eight lines at a time
// with AVX-512. With an x that is widened in registers, as many are 3 % slower.
template <class Kind>
constexpr int chains_of = WIDE<Kind> ? std::max(8, SUM_REGISTERS) : 8;

// The bytes from a line to the one that is prefetched. With more than a page of 4 KiB, short rows are read at three quarters
// of the bandwidth. With a wide x, they are read 4 to 6 % faster with 1 KiB than with 2 KiB. But if x takes much of the L1
// cache and a line takes many operations, nearer lines would arrive too late. Measured on an EPYC (Zen 4) at 60 GB/s.
constexpr int64_t WIDE_X_BYTES = 1024, PAIR_BYTES = 2048, FAR_BYTES = 8192;
constexpr int64_t SMALL_X_BYTES = 8 << 10;

template <class Kind>
constexpr int64_t bytes_ahead(int64_t count) {
    if (PAIRS<Kind>) return PAIR_BYTES;
    return count * (int64_t)sizeof(typename Kind::X) <= SMALL_X_BYTES ? WIDE_X_BYTES : FAR_BYTES;
}

template <class Kind>
INLINE Vec row_sums(const typename Kind::Weight *w, const typename Kind::X *x, int64_t count) {
    const int64_t ahead = bytes_ahead<Kind>(count);
    constexpr int CHAINS = chains_of<Kind>;
    Vec sum[CHAINS];
    UNROLLED
    for (Vec &each : sum) each = Vec{};
    int64_t i = 0;
    for (; i + CHAINS * Kind::STEP <= count; i += CHAINS * Kind::STEP) {
        // All prefetches first, so that they need not wait for the loads.
        UNROLLED
        for (int64_t at = 0; at < CHAINS * Kind::STEP * (int64_t)sizeof *w; at += LINE)
            __builtin_prefetch((const uint8_t *)(w + i) + at + ahead, 0, 2);
        UNROLLED
        for (int c = 0; c < CHAINS; ++c) {
            const int64_t at = i + c * Kind::STEP;
            sum[c] = Kind::add(sum[c], Kind::values(w + at), Kind::values(x + at));
        }
    }
    for (; i + Kind::STEP <= count; i += Kind::STEP) sum[0] = Kind::add(sum[0], Kind::values(w + i), Kind::values(x + i));
    if (i < count)
        sum[1] = Kind::add(sum[1], Kind::values_part(w + i, count - i), Kind::values_part(x + i, count - i));
    UNROLLED
    for (int half = CHAINS / 2; half; half /= 2) {
        UNROLLED
        for (int c = 0; c < half; ++c) sum[c] += sum[c + half];
    }
    return sum[0];
}

template <class Kind>
TARGET void multiply_vector(const PackedLinear &job, int64_t begin, int64_t end) {
    const auto *x = (const typename Kind::X *)job.operand;
    const auto *w = (const typename Kind::Weight *)job.packed;
    for (int64_t n = begin; n < end; n += LANES) {
        const int64_t count = std::min<int64_t>(LANES, end - n);
        Vec sum[LANES];
        UNROLLED
        for (Vec &each : sum) each = Vec{};
        for (int64_t k = 0; k < count; ++k) sum[k] = row_sums<Kind>(w + (n + k) * job.in, x, job.in);
        float bias[LANES] = {};
        if (job.bias) widen(job.type, job.bias, n, bias, count);
        const Vec totals = sums(sum) + load(bias);
        if (job.type == Type::float32) store_part((float *)job.y + n, totals, count);
        if (job.type == Type::bfloat16) store_part((Bf16 *)job.y + n, totals, count);
        if (job.type == Type::float16) store_part((Half *)job.y + n, totals, count);
    }
}

TARGET inline void multiply_plain_vector(const PackedLinear &job, int64_t begin, int64_t end) {
#ifdef FLEXGEN_DOT_BF16
    if (by_pairs(job)) return multiply_vector<Paired>(job, begin, end);
#endif
    const bool narrow = job.operand == job.x && job.type != Type::float32;
    if (job.scale_type == Type::bfloat16)
        return narrow ? multiply_vector<Widened<Bf16, Bf16>>(job, begin, end) : multiply_vector<Widened<Bf16>>(job, begin, end);
    narrow ? multiply_vector<Widened<Half, Half>>(job, begin, end) : multiply_vector<Widened<Half>>(job, begin, end);
}

}  // namespace linear
}  // namespace VARIANT
