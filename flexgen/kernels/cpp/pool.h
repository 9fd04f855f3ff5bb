// Threads for the kernels: those of torch, or a pool if torch's threads are not available.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

// Run `work` on the calling thread and on up to `threads - 1` others, and return when all have finished. `work` must do
// the whole job for any number of threads.
//
// OpenMP's threads spin for milliseconds after each operation of torch, so separate threads would compete with them for
// cores. If torch uses OpenMP, its threads do the work; always ask for the same number as torch, because OpenMP creates
// new threads for another number. Otherwise, and in a child process after fork, the work is done by a pool of threads
// that sleep between calls. The pool serves one caller at a time; other callers run `work` on their own thread.
void run_on_threads(int threads, const std::function<void()> &work);

// Below this much memory, other threads cost more than they save.
constexpr int64_t BYTES_FOR_THREADS = 256 << 10;

inline int useful_threads(int threads, int64_t nbytes) { return nbytes < BYTES_FOR_THREADS ? 1 : threads; }

// Divides the pieces 0 to `count` of a job among threads. Each thread has a run of consecutive pieces, so that it reads
// their memory in order, without gaps. When its run has ended, it takes the next pieces of the other runs.
class Pieces {
public:
    Pieces(int64_t count, int threads) : runs_(std::max(threads, 1)) {
        const int64_t runs = (int64_t)runs_.size();
        for (int64_t n = 0; n < runs; ++n) {
            runs_[n].next = count * n / runs;
            runs_[n].end = count * (n + 1) / runs;
        }
    }

    // Call `work(n)` for pieces until none are left. Each thread calls it once.
    template <class Work>
    void share(const Work &work) {
        const size_t own = joined_.fetch_add(1), runs = runs_.size();
        for (size_t i = 0; i < runs; ++i) {
            Run &run = runs_[(own + i) % runs];
            for (int64_t n; (n = run.next.fetch_add(1)) < run.end;) work(n);
        }
    }

private:
    struct alignas(64) Run {  // in a cache line of its own
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Run> runs_;
    std::atomic<size_t> joined_{0};
};
