// Products of one x with one or several matrices, in one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "kernels.h"
#include "pool.h"

// The approximate size of a piece of W, if x has one row. At the end of a product, a thread waits for at most one piece.
constexpr int64_t WEIGHT_PIECE_BYTES = 64 << 10;
constexpr int64_t ROWS_AT_ONCE = 512;  // of x. W is read for each part of x: with 256, 1024 rows take 2 % longer
constexpr int64_t WHOLE_ROWS = 32;  // of x. Parts of x begin at a multiple of it. No variant multiplies more rows at once

// One of the matrices that are multiplied with the same x.
struct Matrix {
    int64_t out;
    char *y;
    const void *bias;
    const uint8_t *packed;
    const void *scales, *minimums;
};

// Divides the rows of W of some products among threads, in pieces of at most `most` rows. Each thread has a run of
// consecutive pieces, so that it reads their memory in order, without gaps. When its run has ended, it takes the next pieces
// of the other runs. If x has many rows, the last pieces of a run become smaller and smaller, so that all threads end at
// nearly the same time. All runs have equally many rows, but begin and end with whole blocks.
class Pieces {
public:
    Pieces(const std::vector<PackedLinear> &products, int64_t most, int threads) : runs_(threads) {
        int64_t total = 0, before = 0;
        for (const PackedLinear &product : products) total += product.out;
        for (const PackedLinear &product : products) {
            const int64_t block = product.block;
            const auto begin_of = [&](int64_t run) {
                const int64_t row = total * run / threads - before;
                return row < product.out ? std::max<int64_t>(row, 0) / block * block : product.out;
            };
            for (int run = 0; run < threads; ++run) {
                const int64_t end = begin_of(run + 1), each = std::max<int64_t>(most / block, 1);
                const int64_t run_end = total * (run + 1) / threads - before, least = product.tiled ? 1 : each;
                for (int64_t begin = begin_of(run), next; begin < end; begin = next) {
                    const int64_t left = (run_end - begin) / block;
                    next = std::min(begin + std::clamp<int64_t>(left / 2, least, each) * block, end);
                    runs_[run].pieces.push_back({&product, begin, next});
                }
            }
            before += product.out;
        }
    }

    // The address at which a run begins to read, or null if it has no pieces.
    const uint8_t *begin(int run) const {
        if (runs_[run].pieces.empty()) return nullptr;
        const Piece &first = runs_[run].pieces.front();
        return first.product->packed + first.begin * (first.product->in * first.product->bits / 8);
    }

    // Multiply pieces until none are left. Each thread calls it once. A thread of a team begins with the run of its number.
    void multiply(const Variant &variant) {
        const size_t own = team_number() >= 0 ? (size_t)team_number() : joined_.fetch_add(1), count = runs_.size();
        for (size_t i = 0; i < count; ++i) {
            Run &run = runs_[(own + i) % count];
            for (size_t n; (n = run.next.fetch_add(1)) < run.pieces.size();) {
                const Piece &piece = run.pieces[n];
                variant.linear(*piece.product, piece.begin, piece.end);
            }
        }
    }

private:
    struct Piece {
        const PackedLinear *product;
        int64_t begin, end;
    };
    struct alignas(64) Run {  // in a cache line of its own
        std::atomic<size_t> next{0};
        std::vector<Piece> pieces;
    };
    std::vector<Run> runs_;
    std::atomic<size_t> joined_{0};
};

// The products of the x of `job` with all matrices. x is converted once, and threads share the pieces of all matrices.
// `streams` (or null) receives where each thread begins to read.
inline void multiply_at_once(const Variant &variant, PackedLinear &job, const std::vector<Matrix> &matrices,
                             int threads, Streams *streams) {
    const int64_t row_bytes = job.in * job.bits / 8;
    int64_t out = 0;
    for (const Matrix &matrix : matrices) out += matrix.out;
    threads = useful_threads(threads, row_bytes * out * job.rows);
    static thread_local std::vector<float> kept;  // the system clears new pages, which takes time
    job.wide = std::move(kept);
    variant.prepare_linear(job);
    std::vector<float> wide = std::move(job.wide);  // not copied for each matrix
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
    }
    // A block of x is read once for each piece, so with tiles a piece has many rows of W.
    const int64_t share = out / (4 * threads);
    const int64_t most = job.tiled ? std::clamp(share, job.piece / 4, job.piece)
                                   : std::min(WEIGHT_PIECE_BYTES / row_bytes, share);
    Pieces pieces(products, most, threads);
    for (int run = 0; streams && !job.encoding && run < std::min(threads, Streams::MOST); ++run)
        streams->begins[run].store(pieces.begin(run), std::memory_order_relaxed);
    std::atomic<int64_t> claimed{0}, ordered{0};
    run_on_threads(threads, [&] {
        for (int64_t part; (part = claimed.fetch_add(1)) < job.parts; ++ordered) variant.order_linear(job, part, part + 1);
        while (ordered < job.parts) std::this_thread::yield();  // other threads work on the rest
        pieces.multiply(variant);
    });
    kept = std::move(wide);
}

// x in the layout of the variant and the pending sums take memory, so products of many rows are computed in parts.
inline void multiply(const Variant &variant, PackedLinear &job, const std::vector<Matrix> &matrices, int threads,
                     Streams *streams = nullptr) {
    if (job.rows <= ROWS_AT_ONCE) return multiply_at_once(variant, job, matrices, threads, streams);
    const int64_t parts = (job.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, item = element_bytes(job.type);
    const auto first_row = [&](int64_t part) {
        const int64_t row = job.rows * part / parts;
        return std::min((row + WHOLE_ROWS - 1) / WHOLE_ROWS * WHOLE_ROWS, job.rows);
    };
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = first_row(part), end = first_row(part + 1);
        PackedLinear own = job;
        own.rows = end - begin;
        own.x = (const char *)job.x + begin * job.in * item;
        std::vector<Matrix> parts_of_y = matrices;
        for (Matrix &matrix : parts_of_y) matrix.y += begin * matrix.out * item;
        multiply_at_once(variant, own, parts_of_y, threads, nullptr);
    }
}
