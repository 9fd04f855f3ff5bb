// Threads for the kernels: those of torch, or others where torch's cannot be had.
#pragma once

#include <functional>

// Run `work` on the calling thread and on up to `threads - 1` others; returns when all are through. `work` must
// do all there is to do whatever the number of threads that run it.
//
// OpenMP's threads spin for milliseconds after each operation of torch, so threads of our own would have to
// share the cores with them. Where torch uses OpenMP, its threads are asked instead; always ask for as many as
// torch does, or OpenMP makes them anew. Otherwise, and in a child after fork, a pool of threads sleeps between
// the calls and serves one caller at a time; `work` runs on the thread of any other caller alone.
void run_on_threads(int threads, const std::function<void()> &work);
