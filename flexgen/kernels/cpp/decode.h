// Decodes W from a published format to y (out, in). The values are those that encoded.h and columns.h multiply with.
#pragma once

#include "encoded.h"

namespace VARIANT {
namespace encoded {

constexpr int64_t DECODED_DEPTH = 64;  // values of a row of W that are transposed at once

// Store values of which `even` are the first, third and so on.
INLINE void store_pairs(float *to, Vec even, Vec odd) {
    for (int i = 0; i < LANES; ++i) {
        to[2 * i] = even[i];
        to[2 * i + 1] = odd[i];
    }
}
template <class T>
INLINE void store_pairs(T *to, Vec even, Vec odd) {
    Shorts first, second;
    store((T *)&first, even);
    store((T *)&second, odd);
    const Words pairs = to_words(first) | to_words(second) << 16;
    memcpy(to, &pairs, sizeof pairs);
}

template <class Codes, bool SMALL, class T>
TARGET void decode_rows(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t STEP = Codes::PARTS * LANES;
    const int64_t complete = job.in / STEP, steps = (job.in + STEP - 1) / STEP;
    const int64_t each = SMALL ? 1 : job.group / STEP, passed = SMALL ? STEP / job.group : 1;
    const int64_t bytes = (job.in * job.bits + 7) / 8, last = complete * LANES;
    static thread_local std::vector<float> room;
    const int64_t stride = padded(groups_of(job)) + LANES;
    float *scales = aligned(room, 2 * stride), *minimums = scales + stride;
    const Words lanes = group_lanes<Codes>(job);
    for (int64_t row = begin; row < end; ++row) {
        row_scales<Codes>(job, row, scales, minimums);
        const uint8_t *codes = job.packed + row * job.encoding->row_bytes;
        uint8_t rest[LANES] = {};
        memcpy(rest, codes + last, bytes - last);
        T *to = (T *)job.y + row * job.in, ends[STEP];
        for (int64_t step = 0, g = 0; step < steps; g += passed) {
            Vec scale[1], minimum[1];
            group_scales<1, SMALL>(scales, stride, g, lanes, scale);
            group_scales<1, SMALL>(minimums, stride, g, lanes, minimum);
            for (const int64_t stop = std::min(step + each, steps); step < stop; ++step) {
                const auto some = Codes::load(step < complete ? codes + step * LANES : rest);
                T *place = step < complete ? to + step * STEP : ends;
                const Vec first = fma(Codes::value(some, 0), scale[0], minimum[0]);
                if constexpr (Codes::PARTS == 1) store(place, first);
                else store_pairs(place, first, fma(Codes::value(some, 1), scale[0], minimum[0]));
            }
        }
        memcpy(to + complete * STEP, ends, (job.in - complete * STEP) * sizeof(T));
    }
}

// Values are decoded with rows of W as lanes, and then transposed.
template <class Kind, class T>
TARGET void decode_columns(const PackedLinear &job, int64_t begin, int64_t end) {
    constexpr int64_t STRIP = Kind::template strip<1>, ROWS = Kind::ROWS;
    const int64_t stride = Kind::words(job);
    const uint32_t *all = (const uint32_t *)job.packed;
    static thread_local std::vector<float> room;
    T *values = (T *)aligned(room, DECODED_DEPTH * STRIP);
    float scales[STRIP], zeros[STRIP];
    for (int64_t n = begin; n < end; n += STRIP) {
        const int64_t count = std::min(STRIP, end - n), words = Kind::word_of(count);
        for (int64_t g = 0; g < groups_of(job); ++g) {
            const int64_t stop = std::min((g + 1) * job.group, job.in);
            strip_scales<Kind, 1>(job, g, n, count, scales, zeros);
            for (int64_t at = g * job.group; at < stop; at += DECODED_DEPTH) {
                const int64_t depth = std::min(DECODED_DEPTH, stop - at);
                for (int64_t k = 0; k < depth; k += ROWS) {
                    uint32_t some[Kind::template strip_words<1>] = {};
                    memcpy(some, all + (at + k) / ROWS * stride + Kind::word_of(n), words * sizeof *some);
                    for (int64_t row = 0; row < ROWS; ++row)
                        for (int64_t slot = 0; slot < STRIP; slot += LANES) {
                            const Words codes = Kind::codes_of(some, slot, row);
                            const Vec value = (integer<Kind::BITS>(codes) - load(zeros + slot)) * load(scales + slot);
                            store(values + (k + row) * STRIP + slot, value);
                        }
                }
                for (int64_t i = 0; i < count; ++i) {
                    T *to = (T *)job.y + (n + i) * job.in + at;
                    const T *from = values + Kind::template place<1>(i);
                    for (int64_t k = 0; k < depth; ++k) to[k] = from[k * STRIP];
                }
            }
        }
    }
}

template <class Codes, class T>
TARGET void decode_groups(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.group < Codes::PARTS * LANES) return decode_rows<Codes, true, T>(job, begin, end);
    decode_rows<Codes, false, T>(job, begin, end);
}

template <class T>
TARGET void decode_type(const PackedLinear &job, int64_t begin, int64_t end) {
    const Encoding &encoding = *job.encoding;
    if (encoding.order == Order::across) return decode_columns<Across, T>(job, begin, end);
    if (encoding.order == Order::down)
        return job.bits == 4 ? decode_columns<Down<4>, T>(job, begin, end) : decode_columns<Down<8>, T>(job, begin, end);
    switch (encoding.code) {
    case Code::int4: return decode_groups<Nibbles<INTEGERS>, T>(job, begin, end);
    case Code::int8: return decode_groups<Octets, T>(job, begin, end);
    case Code::e2m1: return decode_groups<Nibbles<E2M1>, T>(job, begin, end);
    case Code::e4m3: return decode_groups<Floats, T>(job, begin, end);
    }
}

// Rows `begin` to `end` of W, where `begin` is a multiple of ENCODED_BLOCK.
void decode_any(const PackedLinear &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return decode_type<float>(job, begin, end);
    if (job.type == Type::bfloat16) return decode_type<Bf16>(job, begin, end);
    decode_type<Half>(job, begin, end);
}

}  // namespace encoded
}  // namespace VARIANT
