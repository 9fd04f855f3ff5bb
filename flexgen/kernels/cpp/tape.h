// Recorded calls of kernels. A decode step calls the same kernels with the same addresses for each token; only the number
// of cached tokens grows. So the calls of one token can be recorded on a tape and repeated for later tokens, without
// Python code between them (flexgen/kernels/tape.py).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "pool.h"

// A call of a kernel. `later`: the number of tokens by which the cache has grown since the call was recorded. The name is
// for profiles.
struct Call {
    std::string name;
    std::function<void(int64_t later, int threads)> work;
    std::shared_ptr<Streams> reads;  // null unless it reads a large matrix
};

struct Tape {
    std::vector<Call> calls;
    bool whole = true;  // every kernel that ran is on it
    bool shares = false;  // work with other threads
};

extern thread_local Tape *recorded;  // by this thread

// Run a kernel that can be recorded. `work` owns its arguments.
template <class Work>
PyObject *run(const char *name, Work work, int threads, std::shared_ptr<Streams> reads = nullptr) {
    const int64_t before = times_shared();
    if (!without_gil([&] { work(0, threads); })) return nullptr;
    if (recorded) {
        recorded->calls.push_back({name, std::move(work), std::move(reads)});
        recorded->shares |= times_shared() > before;
    }
    Py_RETURN_NONE;
}

// Run a kernel that cannot be recorded.
template <class Work>
bool run_once(const Work &work) {
    if (recorded) recorded->whole = false;
    return without_gil(work);
}
