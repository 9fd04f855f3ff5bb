// Products of groups of rows of x, each with a matrix of its own, in one call: the experts of a mixture. Threads share
// the pieces of all matrices, so that matrices of a few hundred KiB keep them busy.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "pool.h"

// Rows of W in a piece, rounded up to whole blocks.
constexpr int64_t EXPERT_PIECE = 96;

// Calls the functions of `variant` for products for every job. All jobs have equal sizes, except for their rows.
inline void multiply_each(const Variant &variant, std::vector<PackedLinear> &jobs, int threads) {
    const int64_t count = (int64_t)jobs.size();
    std::atomic<int64_t> prepared{0}, claimed{0};
    run_on_threads(std::min<int64_t>(threads, count), [&] {
        for (int64_t n; (n = prepared.fetch_add(1)) < count;) {
            variant.prepare_linear(jobs[n]);
            if (jobs[n].parts) variant.order_linear(jobs[n], 0, jobs[n].parts);
        }
    });
    int64_t block = 1;  // the largest of all jobs, of which the others are divisors
    for (const PackedLinear &job : jobs) block = std::max(block, job.block);
    const int64_t piece = (EXPERT_PIECE + block - 1) / block * block;
    const int64_t out = jobs[0].out, pieces = (out + piece - 1) / piece;
    run_on_threads(threads, [&] {
        for (int64_t n; (n = claimed.fetch_add(1)) < count * pieces;) {
            const int64_t begin = n % pieces * piece;
            variant.linear(jobs[n / pieces], begin, std::min(begin + piece, out));
        }
    });
}
