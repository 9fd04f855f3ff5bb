// Threads for the kernels: those of torch, or a pool if torch's threads are not available.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

// Run `work` on the calling thread and on up to `threads - 1` others, and return when all have finished. `work` must do
// the whole job for any number of threads.
//
// OpenMP's threads spin for milliseconds after each operation of torch, so separate threads would compete with them for
// cores. If torch uses OpenMP, its threads do the work; always ask for the same number as torch, because OpenMP creates
// new threads for another number. Otherwise, and in a child process after fork, the work is done by a pool of threads
// that sleep between calls. The pool serves one caller at a time; other callers run `work` on their own thread.
void run_on_threads(int threads, const std::function<void()> &work);

// Run `lead` on the calling thread. Until it returns, up to `threads - 1` others wait without sleeping for the work that
// `lead` gives to `run_on_threads`: to start and to end a region takes longer than the work of a small kernel.
void run_with_team(int threads, const std::function<void()> &lead);

// The number of the calling thread in its team, from 0, or -1 outside of a team.
int team_number();

// Where each thread begins to read a large matrix, by its number in the team.
struct Streams {
    static constexpr int MOST = 16;
    std::atomic<const uint8_t *> begins[MOST] = {};
};

// Called by `lead`: threads that wait for others prefetch the beginning of `next`, or nothing if it is null. While no
// thread reads memory, its bandwidth is lost.
void read_next(const Streams *next);

// Below this much memory, other threads cost more than they save.
constexpr int64_t BYTES_FOR_THREADS = 256 << 10;

inline int useful_threads(int threads, int64_t nbytes) { return nbytes < BYTES_FOR_THREADS ? 1 : threads; }

// The approximate size of a piece of work for one thread.
constexpr int64_t PIECE_BYTES = 64 << 10;

// Call `work(begin, end)` for all rows, in pieces that threads share.
template <class Work>
void by_rows(int64_t rows, int64_t row_bytes, int threads, const Work &work) {
    const int64_t piece = std::max<int64_t>(1, PIECE_BYTES / std::max<int64_t>(row_bytes, 1));
    std::atomic<int64_t> claimed{0};
    run_on_threads(useful_threads(threads, rows * row_bytes), [&] {
        for (int64_t begin; (begin = claimed.fetch_add(piece)) < rows;)
            work(begin, std::min<int64_t>(begin + piece, rows));
    });
}
