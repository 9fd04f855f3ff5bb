// Products with W in the tensors of a published format, read in place. Each value is unpacked in registers, to exactly
// code * scale + minimum in float32, and multiplied with as many rows of x as fit in registers.
//
// This file has formats with rows of codes. x is stored in their order: a step is LANES bytes of codes, and with four
// bits its even values precede its odd ones. For the other formats, see columns.h.
#pragma once

#include "columns.h"

namespace VARIANT {
namespace encoded {

using linear::LINE;
using linear::padded;
using linear::weights_beside;
using linear::write_totals;

template <const float *TABLE>
struct Nibbles {
    static constexpr int PARTS = 2;  // vectors of values in a step
    static constexpr float FACTOR = 1.0f;  // a value over what `value` returns

    INLINE static Words load(const uint8_t *from) { return load_octets(from); }
    INLINE static Vec value(Words codes, int part) { return lookup(TABLE, part ? codes >> 4 : codes); }
};

struct Octets {
    static constexpr int PARTS = 1;
    static constexpr float FACTOR = 1.0f;

    INLINE static Words load(const uint8_t *from) { return load_octets(from); }
    INLINE static Vec value(Words codes, int) { return integer<8>(codes); }
};

// e4m3. The bits of a code are those of a half whose exponent is 8 less. A sign-extended and shifted code has its sign
// in two bits; the second one is cleared.
struct Floats {
    static constexpr int PARTS = 1;
    static constexpr float FACTOR = 256.0f;

    INLINE static Shorts load(const uint8_t *from) { return load_signed(from); }
    INLINE static Vec value(Shorts codes, int) { return from_half((codes << 7) & 0xbfff); }
};

// The distance between rows of x.
inline int64_t width_of(const PackedLinear &job) { return whole(job.in, 2 * LANES); }

// Powers of two, stored as their exponent plus 127; 255 is NaN.
INLINE Vec power(Words exponents) {
    const Words special = (Words)((exponents == 0) | (exponents == 255)) & 0x400000u;
    return (Vec)((exponents << 23) | special);
}

// `count` scales from number `at`, with space for whole vectors.
TARGET inline void widen_scales(const PackedLinear &job, int64_t at, float *to, int64_t count) {
    const Encoding &encoding = *job.encoding;
    if (encoding.scale == Scale::number) return widen(job.scale_type, job.scales, at, to, count);
    float factor = 1.0f;
    if (encoding.scale == Scale::e4m3) {
        const float overall = *(const float *)job.minimums;
        factor = Floats::FACTOR * (encoding.divides ? 1.0f / overall : overall);
    }
    const uint8_t *octets = (const uint8_t *)job.scales + at;
    for (int64_t i = 0; i < count; i += LANES) {
        uint8_t some[LANES] = {};
        memcpy(some, octets + i, std::min<int64_t>(LANES, count - i));
        const bool floats = encoding.scale == Scale::e4m3;
        store(to + i, (floats ? Floats::value(load_signed(some), 0) : power(load_octets(some))) * factor);
    }
}

// The scales and minimums of row `row` of W in float32. Codes of integers count from the middle of their range.
template <class Codes>
TARGET void row_scales(const PackedLinear &job, int64_t row, float *scales, float *minimums) {
    const int64_t groups = groups_of(job);
    widen_scales(job, row / job.encoding->scale_rows * groups, scales, groups);
    for (int64_t g = 0; g < groups; ++g) scales[g] *= Codes::FACTOR;
    std::fill_n(scales + groups, LANES, 0.0f);  // of lanes beyond the row
    std::fill_n(minimums, groups + LANES, 0.0f);
    if (!job.minimums || job.encoding->scale == Scale::e4m3) return;
    const int64_t each = 32 / job.bits, shift = row % each * job.bits;  // zero points are packed along the rows
    const uint32_t *zeros = (const uint32_t *)job.minimums + row / each * groups;
    const int middle = 1 << (job.bits - 1);
    for (int64_t g = 0; g < groups; ++g)
        minimums[g] = scales[g] * (float)(middle - (int)(zeros[g] >> shift & (2 * middle - 1)));
}

// Rows of W, with scales and minimums (WEIGHTS, stride).
template <int WEIGHTS>
struct Block {
    const uint8_t *codes[WEIGHTS];
    uint8_t ends[WEIGHTS][LANES];  // the codes of an incomplete step, and zeros
    const float *scales, *minimums;
    int64_t stride;
};

// For each row of W, the scales of the lanes from group `g`. With SMALL groups, a step has several.
template <int WEIGHTS, bool SMALL>
INLINE void group_scales(const float *from, int64_t stride, int64_t g, Words lanes, Vec (&to)[WEIGHTS]) {
    UNROLLED
    for (int n = 0; n < WEIGHTS; ++n) {
        const float *at = from + n * stride + g;
        to[n] = SMALL ? permute(load(at), lanes) : splat(*at);
    }
}

// The group of each lane of a step, for SMALL groups.
template <class Codes>
INLINE Words group_lanes(const PackedLinear &job) {
    uint32_t groups[LANES];
    for (int i = 0; i < LANES; ++i) groups[i] = (uint32_t)(i * Codes::PARTS / job.group);
    return raw<Words>(groups);
}

// Products of rows `n` to `n` + `count` of W with rows `m` to `m` + X of x.
template <class Codes, int X, int WEIGHTS, bool SMALL>
APART void multiply_block(const PackedLinear &job, const Block<WEIGHTS> &block, int64_t m, int64_t n, int count) {
    constexpr int64_t STEP = Codes::PARTS * LANES;
    const int64_t width = width_of(job), complete = job.in / STEP, steps = (job.in + STEP - 1) / STEP;
    const int64_t each = SMALL ? 1 : job.group / STEP, passed = SMALL ? STEP / job.group : 1;
    const int64_t ahead = m == 0 ? WEIGHTS * job.encoding->row_bytes : 0;  // the next block
    const Words lanes = group_lanes<Codes>(job);
    const float *x = (const float *)job.operand + m * width;
    Vec sum[LANES] = {};
    for (int64_t step = 0, g = 0; step < steps; g += passed) {
        Vec scale[WEIGHTS], minimum[WEIGHTS];
        group_scales<WEIGHTS, SMALL>(block.scales, block.stride, g, lanes, scale);
        group_scales<WEIGHTS, SMALL>(block.minimums, block.stride, g, lanes, minimum);
        for (const int64_t end = std::min(step + each, steps); step < end; ++step) {
            const int64_t at = step * LANES;
            decltype(Codes::load(nullptr)) codes[WEIGHTS];
            UNROLLED
            for (int k = 0; k < WEIGHTS; ++k) {
                if (at % LINE == 0) __builtin_prefetch(block.codes[k] + at + ahead);
                codes[k] = Codes::load(step < complete ? block.codes[k] + at : block.ends[k]);
            }
            UNROLLED
            for (int part = 0; part < Codes::PARTS; ++part) {
                Vec w[WEIGHTS];
                UNROLLED
                for (int k = 0; k < WEIGHTS; ++k) w[k] = fma(Codes::value(codes[k], part), scale[k], minimum[k]);
                UNROLLED
                for (int i = 0; i < X; ++i) {
                    const Vec values = load(x + i * width + step * STEP + part * LANES);
                    UNROLLED
                    for (int k = 0; k < WEIGHTS; ++k) sum[k * X + i] = fma(w[k], values, sum[k * X + i]);
                }
            }
        }
    }
    write_totals<X, WEIGHTS>(job, sum, m, n, count);
}

template <class Codes, int X, bool SMALL>
TARGET void multiply_rows(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int WEIGHTS = weights_beside(X);
    const int64_t stride = padded(groups_of(job)) + LANES, bytes = (job.in * job.bits + 7) / 8, last = bytes / LANES * LANES;
    static thread_local std::vector<float> room;
    float *scales = aligned(room, 2 * WEIGHTS * stride), *minimums = scales + WEIGHTS * stride;
    Block<WEIGHTS> block{{}, {}, scales, minimums, stride};
    for (int64_t n = begin; n < end; n += WEIGHTS) {
        for (int k = 0; k < WEIGHTS; ++k) {
            const int64_t row = std::min(n + k, end - 1);  // memory beyond the last row must not be read
            block.codes[k] = job.packed + row * job.encoding->row_bytes;
            memcpy(block.ends[k], block.codes[k] + last, bytes - last);
            row_scales<Codes>(job, row, scales + k * stride, minimums + k * stride);
        }
        const int count = (int)std::min<int64_t>(WEIGHTS, end - n);
        // The last block of x begins early enough to be complete, and computes some rows twice.
        for (int64_t m = 0; m < job.rows; m += X)
            multiply_block<Codes, X, WEIGHTS, SMALL>(job, block, std::min(m, job.rows - X), n, count);
    }
}

template <class Codes, int X>
TARGET void multiply_row_blocks(const PackedLinear &job, int64_t begin, int64_t end) {
    const int64_t blocks = (job.rows + MAX_X - 1) / MAX_X;
    if ((job.rows + blocks - 1) / blocks == X) {
        if (job.group < Codes::PARTS * LANES) return multiply_rows<Codes, X, true>(job, begin, end);
        return multiply_rows<Codes, X, false>(job, begin, end);
    }
    if constexpr (X > 1) multiply_row_blocks<Codes, X - 1>(job, begin, end);
}

// x in float32, in the order of the steps, with zeros up to the width.
TARGET inline void prepare_rows(PackedLinear &job) {
    const int64_t width = width_of(job);
    float *to = aligned(job.wide, job.rows * width + width), *row = to + job.rows * width;
    job.operand = to;
    std::fill(row + job.in, row + width, 0.0f);
    for (int64_t m = 0; m < job.rows; ++m, to += width) {
        widen(job.type, job.x, m * job.in, row, job.in);
        if (job.bits == 8) {
            memcpy(to, row, width * sizeof(float));
            continue;
        }
        for (int64_t at = 0; at < width; at += 2 * LANES) {
            for (int i = 0; i < LANES; ++i) {
                to[at + i] = row[at + 2 * i];
                to[at + LANES + i] = row[at + 2 * i + 1];
            }
        }
    }
}

TARGET inline void prepare(PackedLinear &job) {
    job.encoding->order == Order::rows ? prepare_rows(job) : prepare_columns(job);
}

TARGET inline void multiply(const PackedLinear &job, int64_t begin, int64_t end) {
    const Encoding &encoding = *job.encoding;
    if (encoding.order == Order::across) return multiply_columns<Across, MAX_X>(job, begin, end);
    if (encoding.order == Order::down)
        return job.bits == 4 ? multiply_columns<Down<4>, MAX_X>(job, begin, end)
                             : multiply_columns<Down<8>, MAX_X>(job, begin, end);
    switch (encoding.code) {
    case Code::int4: return multiply_row_blocks<Nibbles<INTEGERS>, MAX_X>(job, begin, end);
    case Code::int8: return multiply_row_blocks<Octets, MAX_X>(job, begin, end);
    case Code::e2m1: return multiply_row_blocks<Nibbles<E2M1>, MAX_X>(job, begin, end);
    case Code::e4m3: return multiply_row_blocks<Floats, MAX_X>(job, begin, end);
    }
}

}  // namespace encoded
}  // namespace VARIANT
