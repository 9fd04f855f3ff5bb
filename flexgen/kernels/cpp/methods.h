// Which kernel multiplies how many rows of x. The numbers are measured on an EPYC (Zen 4; those of AVX2, Zen 3);
// benchmarks/packed_linear.py times the products. Another choice changes the order of sums, but not their exactness.
#pragma once

#include <cstdint>

namespace VARIANT {
namespace linear {

enum class Method {
    lines,  // lines.h, rounded.h: a row of W after the other, line by line
    strips,  // fused.h: 16 rows of W at a time, unpacked in registers for each block of x
    panels,  // panels.h, rounded.h: 32 or 16 rows of W at a time, unpacked once for all rows of x
    vector,  // matrix_vector.h: a row of W after the other
    tiles,  // tiles.h: tiles of a few rows of W and of x
    outer,  // outer.h, float_outer.h: whole vectors of rows of x
    blocks,  // linear.h: a few rows of W at a time, unpacked in registers for each block of x
    one_row,  // one_row.h: one row of x with the codes of two rows of W at a time
    few_rows,  // few_rows.h: 2 to 14 rows of x with weights that are decoded in registers
};

struct Range {
    int64_t rows;  // the maximum
    Method method;
};
constexpr int64_t ANY = INT64_MAX;

// With dot products of bfloat16 or int8:
constexpr Range INT4_BY_DOTS[] = {{1, Method::lines}, {ANY, Method::strips}};
constexpr Range INT8_BY_DOTS[] = {{1, Method::lines}, {64, Method::strips}, {ANY, Method::panels}};
// With sums of products of short integers (rounded.h):
constexpr Range ROUNDED[] = {{1, Method::lines}, {ANY, Method::panels}};
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
#elif defined(FLEXGEN_DOT_BYTES)
    return job.rounded && job.bits != 16 && job.group == DOTS_GROUP;
#else
    (void)job;
    return false;
#endif
}

// Outer products begin with more rows of x than `fewest_rows`, and the last vector of rows has a multiple of ROW_UNIT lanes.
#ifdef FLEXGEN_FLOAT_OUTER
constexpr int64_t ROW_UNIT = LANES;
inline int64_t fewest_rows(const PackedLinear &job) { return job.bits == 16 ? 2 * LANES : LANES; }
#else
constexpr int64_t ROW_UNIT = LANES / 2;
inline int64_t fewest_rows(const PackedLinear &) { return LANES; }
#endif

// Whether the rows of x fill nine tenths of the lanes of their vectors, if each lane is a row.
inline bool fills_lanes(const PackedLinear &job) {
    return job.rows > fewest_rows(job) && 10 * job.rows >= 9 * whole(job.rows, ROW_UNIT);
}

// Whether the variant multiplies the types of `job` by outer products.
inline bool has_outer(const PackedLinear &job) {
#ifdef FLEXGEN_FLOAT_OUTER
    (void)job;
    return true;
#else
    return by_pairs(job);
#endif
}

// For Method::few_rows: the rows of x, in blocks of those that are multiplied at once, and the most values of each row that
// are in the L1 cache.
constexpr int LEAST_FEW_ROWS = 2, MOST_FEW_ROWS = 14, FEW_ROWS_BLOCK = 8;
constexpr int few_rows_blocks(int64_t rows) { return rows <= FEW_ROWS_BLOCK ? 1 : 2; }
constexpr int64_t few_rows_depth(int blocks) { return blocks == 1 ? 512 : 256; }

constexpr int64_t DWORDS_GROUP = 64;  // groups for Method::one_row and Method::few_rows are multiples of it

// Whether the variant decodes integers from dwords.
inline bool decodes_dwords(const PackedLinear &job) {
#ifdef FLEXGEN_DWORDS
    return job.bits != 16 && job.group % DWORDS_GROUP == 0;
#else
    (void)job;
    return false;
#endif
}

inline bool fits_few_rows(const PackedLinear &job) {
    return job.rows >= LEAST_FEW_ROWS && job.rows <= MOST_FEW_ROWS &&
           job.group <= few_rows_depth(few_rows_blocks(job.rows));
}

inline const Range *ranges_by_dots(const PackedLinear &job) {
#ifdef FLEXGEN_DOT_BYTES
    (void)job;
    return ROUNDED;
#else
    return job.bits == 4 ? INT4_BY_DOTS : INT8_BY_DOTS;
#endif
}

inline Method method_of(const PackedLinear &job) {
    const Range *range = by_dots(job) ? ranges_by_dots(job) : job.bits == 16 ? HALVES : INTEGERS;
    while (job.rows > range->rows) ++range;
    const bool in_float32 = range->method == Method::blocks || range->method == Method::tiles;
    if (in_float32 && has_outer(job) && fills_lanes(job)) return Method::outer;
    if (range->method == Method::blocks && decodes_dwords(job)) {
        if (job.rows == 1) return Method::one_row;
        if (fits_few_rows(job)) return Method::few_rows;
    }
    return range->method;
}

}  // namespace linear
}  // namespace VARIANT
