// Products of groups of rows of x, each with a matrix of its own, in one call: the experts of a mixture. Threads share
// the pieces of all matrices, so that matrices of a few hundred KiB keep them busy.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "products.h"

// Rows of W in a piece, rounded up to whole blocks. With few rows of x, a piece has WEIGHT_PIECE_BYTES, if this is less.
constexpr int64_t EXPERT_PIECE = 96, FEW_ROWS = 4;

// The addresses of matrices (flexgen/kernels/grouped_matrices.py): four rows with one number for each matrix; 0 for no part.
struct AddressTable {
    const int64_t *values, *scales, *minimums, *biases;

    AddressTable(const int64_t *table, int64_t count)
        : values(table), scales(table + count), minimums(table + 2 * count), biases(table + 3 * count) {}
};

// Calls the functions of `variant` for products for every job. All jobs have equal sizes, except for their rows.
inline void multiply_each(const Variant &variant, std::vector<PackedLinear> &jobs, int threads) {
    const int64_t count = (int64_t)jobs.size();
    std::atomic<int64_t> prepared{0};
    run_on_threads(std::min<int64_t>(threads, count), [&] {
        for (int64_t n; (n = prepared.fetch_add(1)) < count;) {
            variant.prepare_linear(jobs[n]);
            if (jobs[n].parts) variant.order_linear(jobs[n], 0, jobs[n].parts);
        }
    });
    int64_t rows = 0;
    for (const PackedLinear &job : jobs) rows = std::max(rows, job.rows);
    const int64_t few = WEIGHT_PIECE_BYTES * 8 / (jobs[0].in * jobs[0].bits);
    Pieces pieces(jobs, rows <= FEW_ROWS ? std::min(EXPERT_PIECE, few) : EXPERT_PIECE, threads);
    run_on_threads(threads, [&] { pieces.multiply(variant); });
}
