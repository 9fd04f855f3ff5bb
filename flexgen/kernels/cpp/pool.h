// Threads for the kernels: those of torch, or a pool if torch's threads are not available.
#pragma once

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

// Below this much memory, other threads cost more than they save.
constexpr int64_t BYTES_FOR_THREADS = 256 << 10;

inline int useful_threads(int threads, int64_t nbytes) { return nbytes < BYTES_FOR_THREADS ? 1 : threads; }
