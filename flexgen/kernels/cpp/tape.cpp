// Functions for Python: recording and repeating calls of kernels.
#include "tape.h"

#include <chrono>

thread_local Tape *recorded = nullptr;

namespace {

constexpr const char *TAPE = "flexgen.tape";

void free_tape(PyObject *capsule) { delete (Tape *)PyCapsule_GetPointer(capsule, TAPE); }

}  // namespace

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
    PyObject *capsules;
    long long later;
    int threads;
    if (!PyArg_ParseTuple(args, "O!Li", &PyTuple_Type, &capsules, &later, &threads)) return nullptr;
    std::vector<const Tape *> tapes;
    for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(capsules); ++n) {
        tapes.push_back((const Tape *)PyCapsule_GetPointer(PyTuple_GET_ITEM(capsules, n), TAPE));
        if (!tapes.back()) return nullptr;
    }
    std::vector<double> ends;
    ends.reserve(tapes.size());
    const auto work = [&] {
        const auto began = std::chrono::steady_clock::now();
        for (const Tape *tape : tapes) {
            for (const Call &call : tape->calls) call(later, threads);
            ends.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
        }
    };
    if (!without_gil(work)) return nullptr;
    PyObject *list = PyList_New((Py_ssize_t)ends.size());
    for (size_t n = 0; list && n < ends.size(); ++n) {
        PyObject *end = PyFloat_FromDouble(ends[n]);
        if (!end) Py_CLEAR(list);
        else PyList_SET_ITEM(list, (Py_ssize_t)n, end);
    }
    return list;
}
