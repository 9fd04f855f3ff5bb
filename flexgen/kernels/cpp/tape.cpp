// Functions for Python: recording and repeating calls of kernels.
#include "tape.h"

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
