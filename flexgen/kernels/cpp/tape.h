// Recorded calls of kernels. A decode step calls the same kernels with the same addresses for each token; only the number
// of cached tokens grows. So the calls of one token can be recorded on a tape and repeated for later tokens, without
// Python code between them (flexgen/kernels/tape.py).
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "bindings.h"

// A call of a kernel. `later`: the number of tokens by which the cache has grown since the call was recorded.
typedef std::function<void(int64_t later, int threads)> Call;

struct Tape {
    std::vector<Call> calls;
    bool whole = true;  // every kernel that ran is on it
};

extern thread_local Tape *recorded;  // by this thread

// Run a kernel that can be recorded. `call` owns its arguments.
inline PyObject *run(Call call, int threads) {
    if (!without_gil([&] { call(0, threads); })) return nullptr;
    if (recorded) recorded->calls.push_back(std::move(call));
    Py_RETURN_NONE;
}

// Run a kernel that cannot be recorded.
template <class Work>
bool run_once(const Work &work) {
    if (recorded) recorded->whole = false;
    return without_gil(work);
}
