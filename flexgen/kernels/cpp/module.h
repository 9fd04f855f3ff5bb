// What the files of the Python module share.
#pragma once

#include <Python.h>

#include <exception>

#include "kernels.h"

extern const Variant *variant;  // in use

// Call `work` without the interpreter's lock. Returns false and sets a Python error if it runs out of memory.
template <class Work>
bool without_gil(const Work &work) {
    bool done = true;
    Py_BEGIN_ALLOW_THREADS;
    try {
        work();
    } catch (const std::exception &) {
        done = false;
    }
    Py_END_ALLOW_THREADS;
    if (!done) PyErr_NoMemory();
    return done;
}

PyObject *py_decode_attention(PyObject *, PyObject *args);
PyObject *py_attend_prefix(PyObject *, PyObject *args);
PyObject *py_choose(PyObject *, PyObject *args);
PyObject *py_attend_chosen(PyObject *, PyObject *args);
