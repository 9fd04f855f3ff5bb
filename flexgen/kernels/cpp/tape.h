// Recorded calls of kernels. A decode step calls the same kernels with the same addresses for each token; only the number
// of cached tokens grows. So the calls for a token can be recorded on a tape, and then run for this token and for later
// ones without Python code between them (flexgen/kernels/tape.py). While calls are recorded, no kernel runs.
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
    std::shared_ptr<Streams> reads;  // null unless it reads a matrix that threads share
};

struct Tape {
    std::vector<Call> calls;
};

extern thread_local Tape *recorded;  // by this thread

extern PyObject *unrecordable;  // the exception of a call that cannot be recorded

// Run a kernel, or record it. `work` owns its arguments. `streams`: where it begins to read, unless its matrix is small.
template <class Work>
PyObject *run(const char *name, Work work, int threads, std::shared_ptr<Streams> streams = nullptr) {
    if (recorded) recorded->calls.push_back({name, std::move(work), std::move(streams)});
    else if (!without_gil([&] { work(0, threads); })) return nullptr;
    Py_RETURN_NONE;
}

// Run a kernel that cannot be recorded.
template <class Work>
bool run_once(const Work &work) {
    if (!recorded) return without_gil(work);
    PyErr_SetString(unrecordable, "a kernel was called that cannot be recorded");
    return false;
}

// The place for `run`'s streams of a product that reads `nbytes`; null if it is not recorded, or small.
inline std::shared_ptr<Streams> streams_of(int64_t nbytes) {
    return recorded && nbytes >= BYTES_FOR_THREADS ? std::make_shared<Streams>() : nullptr;
}
