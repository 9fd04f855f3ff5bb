// Products of one x with one or several matrices, in one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "pool.h"

// The approximate size of a piece of W, if x has one row. At the end of a product, a thread waits for at most one piece.
constexpr int64_t WEIGHT_PIECE_BYTES = 64 << 10;
constexpr int64_t ROWS_AT_ONCE = 256;  // of x

// One of the matrices that are multiplied with the same x.
struct Matrix {
    int64_t out;
    char *y;
    const void *bias;
    const uint8_t *packed;
    const void *scales, *minimums;
};

// The products of the x of `job` with all matrices. x is converted once, and threads share the pieces of all matrices.
// The memory of `job.wide` is used for it and returned.
inline void multiply_at_once(const Variant &variant, PackedLinear &job, const std::vector<Matrix> &matrices,
                             int threads) {
    const int64_t row_bytes = job.in * job.bits / 8;
    int64_t out = 0, count = 0;
    for (const Matrix &matrix : matrices) out += matrix.out;
    threads = useful_threads(threads, row_bytes * out * job.rows);
    variant.prepare_linear(job);
    std::vector<float> wide = std::move(job.wide);  // not copied for each matrix
    std::atomic<int64_t> ordered{0};
    const auto order = [&] {
        for (int64_t part; (part = ordered.fetch_add(1)) < job.parts;) variant.order_linear(job, part, part + 1);
    };
    if (job.parts) run_on_threads(job.parts > 1 ? threads : 1, order);
    // A piece is a whole number of blocks, with at least four pieces for each thread. A block of x is read once for each
    // piece, so with tiles a piece has many rows of W.
    const int64_t most = std::min(job.tiled ? job.piece : WEIGHT_PIECE_BYTES / row_bytes, out / (4 * threads));
    const int64_t piece = std::max<int64_t>(1, most / job.block) * job.block;
    std::vector<PackedLinear> products;
    for (const Matrix &matrix : matrices) {
        PackedLinear product = job;
        product.out = matrix.out;
        product.y = matrix.y;
        product.bias = matrix.bias;
        product.packed = matrix.packed;
        product.scales = matrix.scales;
        product.minimums = matrix.minimums;
        products.push_back(std::move(product));
        count += (matrix.out + piece - 1) / piece;
    }
    Pieces pieces(count, threads);
    const auto multiply_piece = [&](int64_t n) {
        for (const PackedLinear &product : products) {
            const int64_t own = (product.out + piece - 1) / piece;
            if (n < own) return variant.linear(product, n * piece, std::min((n + 1) * piece, product.out));
            n -= own;
        }
    };
    run_on_threads(threads, [&] { pieces.share(multiply_piece); });
    job.wide = std::move(wide);
}

// x in the layout of the variant and the pending sums take memory, so products of many rows are computed in parts.
inline void multiply(const Variant &variant, PackedLinear &job, const std::vector<Matrix> &matrices, int threads) {
    if (job.rows <= ROWS_AT_ONCE) return multiply_at_once(variant, job, matrices, threads);
    const int64_t parts = (job.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, item = element_bytes(job.type);
    std::vector<float> wide;  // the parts use the same memory: the system clears new pages
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = job.rows * part / parts, end = job.rows * (part + 1) / parts;
        PackedLinear own = job;
        own.wide = std::move(wide);
        own.rows = end - begin;
        own.x = (const char *)job.x + begin * job.in * item;
        std::vector<Matrix> parts_of_y = matrices;
        for (Matrix &matrix : parts_of_y) matrix.y += begin * matrix.out * item;
        multiply_at_once(variant, own, parts_of_y, threads);
        wide = std::move(own.wide);
    }
}
