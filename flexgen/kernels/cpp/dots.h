// Products of group-wise integers by dot products of short operands, with x in bfloat16, or in int8 after rounding.
#pragma once

#include "codes.h"
#include "lines.h"
#include "strips.h"
#include "fused.h"
#include "panels.h"

namespace VARIANT {
namespace dots {

template <class Kind, int BITS>
TARGET void prepare_bits(PackedLinear &job) {
    const Method method = method_of(job);
    if (method == Method::lines) return prepare_line<Kind, BITS>(job);
    job.tiled = true;
    job.block = method == Method::strips ? PANEL : BLOCK_PANELS * PANEL;
    job.piece = method == Method::strips ? 4 * PANEL : PIECE_PANELS * PANEL;
    prepare_strips<Kind>(job);
}
template <class Kind, int BITS>
TARGET void multiply_bits(const PackedLinear &job, int64_t begin, int64_t end) {
    const Method method = method_of(job);
    if (method == Method::lines) return multiply_lines<Kind, BITS>(job, begin, end);
    if (method == Method::strips) return multiply_fused<Kind, BITS>(job, begin, end);
    multiply_panels<Kind, BITS>(job, begin, end);
}

// Call `work` with the kind of x and the bits of W.
template <class Work>
inline void with_kind(const PackedLinear &job, const Work &work) {
    constexpr std::integral_constant<int, 4> FOUR;
    constexpr std::integral_constant<int, 8> EIGHT;
    if (job.rounded) job.bits == 4 ? work(Bytes(), FOUR) : work(Bytes(), EIGHT);
    else job.bits == 4 ? work(Pairs(), FOUR) : work(Pairs(), EIGHT);
}

inline void prepare(PackedLinear &job) {
    job.block = STRIP;
    with_kind(job, [&](auto kind, auto bits) { prepare_bits<decltype(kind), bits()>(job); });
}
inline void order(const PackedLinear &job, int64_t first, int64_t last) {
    with_kind(job, [&](auto kind, auto bits) { order_strips<decltype(kind), bits()>(job, first, last); });
}
inline void multiply(const PackedLinear &job, int64_t begin, int64_t end) {
    with_kind(job, [&](auto kind, auto bits) { multiply_bits<decltype(kind), bits()>(job, begin, end); });
}

}  // namespace dots
}  // namespace VARIANT
