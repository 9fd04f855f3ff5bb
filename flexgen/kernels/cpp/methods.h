// Which kernel multiplies how many rows of x. The numbers are measured on an EPYC (Zen 4); benchmarks/packed_linear.py times
// the products. Another choice changes the order of sums, but not their exactness.
#pragma once

#include <cstdint>

namespace VARIANT {
namespace linear {

enum class Method {
    lines,  // lines.h: a row of W after the other, line by line
    strips,  // fused.h: 16 rows of W at a time, unpacked in registers for each block of x
    panels,  // panels.h: 32 rows of W at a time, unpacked once for all rows of x
    vector,  // matrix_vector.h: a row of W after the other
    tiles,  // tiles.h: tiles of a few rows of W and of x
    outer,  // outer.h: whole vectors of rows of x; only for bfloat16 with dot products
    blocks,  // linear.h: a few rows of W at a time, unpacked in registers for each block of x
};

struct Range {
    int64_t rows;  // the maximum
    Method method;
};
constexpr int64_t ANY = INT64_MAX;

// With dot products of bfloat16 or int8:
constexpr Range INT4_BY_DOTS[] = {{1, Method::lines}, {ANY, Method::strips}};
constexpr Range INT8_BY_DOTS[] = {{1, Method::lines}, {64, Method::strips}, {ANY, Method::panels}};
// In float32, except for plain bfloat16:
constexpr Range INTEGERS[] = {{16, Method::blocks}, {ANY, Method::tiles}};
constexpr Range HALVES[] = {{1, Method::vector}, {ANY, Method::tiles}};
constexpr int64_t WIDENED_IN_TILES = 16;  // up to this many rows of x, tiles widen half types in registers

constexpr int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

constexpr int64_t DOTS_GROUP = 64;  // groups for dot products are multiples of it

// Whether dot products multiply two matrices in bfloat16.
inline bool by_pairs(const PackedLinear &job) {
#ifdef FLEXGEN_DOT_BF16
    return job.bits == 16 && job.type == Type::bfloat16 && job.scale_type == Type::bfloat16;
#else
    (void)job;
    return false;
#endif
}

// Whether dot products multiply integers. A scale of rounded x belongs to one group.
inline bool by_dots(const PackedLinear &job) {
#ifdef FLEXGEN_DOT_BF16
    if (job.bits == 16 || job.group % DOTS_GROUP) return false;
    return job.rounded ? job.group == DOTS_GROUP : job.type == Type::bfloat16;
#else
    (void)job;
    return false;
#endif
}

// Whether the rows of x fill nine tenths of the lanes of two or more vectors, if each lane is a row. The last vector may be
// half a vector.
inline bool fills_lanes(int64_t rows) { return rows > LANES && 10 * rows >= 9 * whole(rows, LANES / 2); }

inline Method method_of(const PackedLinear &job) {
    const Range *range = by_dots(job) ? (job.bits == 4 ? INT4_BY_DOTS : INT8_BY_DOTS) : job.bits == 16 ? HALVES : INTEGERS;
    while (job.rows > range->rows) ++range;
    if (range->method == Method::tiles && by_pairs(job) && fills_lanes(job.rows)) return Method::outer;
    return range->method;
}

}  // namespace linear
}  // namespace VARIANT
