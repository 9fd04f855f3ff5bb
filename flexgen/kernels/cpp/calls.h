// How the functions of the module run a kernel: without the interpreter's lock, and recorded if Python asks for it.
//
// A decode step calls the same kernels with the same addresses for each token; only the number of cached tokens grows.
// So the calls of one token can be recorded on a tape and repeated for later tokens, without Python code between them
// (flexgen/kernels/tape.py).
#pragma once

#include <exception>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

extern const Variant *variant;  // the one in use

namespace {

// The approximate size of a piece of work for one thread.
constexpr int64_t PIECE_BYTES = 64 << 10;

// Call `work` without the interpreter's lock. Returns false and sets a Python error if it fails.
template <class Work>
bool without_gil(const Work &work) {
    std::string error;
    bool memory = false;
    Py_BEGIN_ALLOW_THREADS;
    try {
        work();
    } catch (const std::bad_alloc &) {
        memory = true;
    } catch (const std::exception &other) {
        error = other.what();
        if (error.empty()) error = "a kernel failed";
    }
    Py_END_ALLOW_THREADS;
    if (memory) PyErr_NoMemory();
    else if (!error.empty()) PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return !memory && error.empty();
}

// A call of a kernel. `later`: the number of tokens by which the cache has grown since the call was recorded.
typedef std::function<void(int64_t later, int threads)> Call;

struct Tape {
    std::vector<Call> calls;
    bool whole = true;  // every kernel that ran is on it
};

thread_local Tape *recorded = nullptr;  // by this thread

// Run a kernel that can be recorded. `call` owns its arguments.
PyObject *run(Call call, int threads) {
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

bool integers(PyObject *list, std::vector<int64_t> &out) {
    if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "expected a list of integers");
        return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
        out.push_back(PyLong_AsLongLong(PyList_GET_ITEM(list, i)));
        if (out.back() == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

constexpr const char *TAPE = "flexgen.tape";

void free_tape(PyObject *capsule) { delete (Tape *)PyCapsule_GetPointer(capsule, TAPE); }

PyObject *py_record(PyObject *, PyObject *) {
    delete recorded;
    recorded = new Tape;
    Py_RETURN_NONE;
}

PyObject *py_end_record(PyObject *, PyObject *) {
    Tape *tape = recorded;
    recorded = nullptr;
    if (!tape || !tape->whole) {
        delete tape;
        Py_RETURN_NONE;
    }
    PyObject *capsule = PyCapsule_New(tape, TAPE, free_tape);
    if (!capsule) delete tape;
    return capsule;
}

PyObject *py_replay(PyObject *, PyObject *args) {
    PyObject *capsule;
    long long later;
    int threads;
    if (!PyArg_ParseTuple(args, "OLi", &capsule, &later, &threads)) return nullptr;
    const auto *tape = (const Tape *)PyCapsule_GetPointer(capsule, TAPE);
    if (!tape) return nullptr;
    const auto work = [&] {
        for (const Call &call : tape->calls) call(later, threads);
    };
    if (!without_gil(work)) return nullptr;
    Py_RETURN_NONE;
}

}  // namespace
