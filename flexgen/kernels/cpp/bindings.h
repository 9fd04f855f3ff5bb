// What the functions for Python share. attention_bindings.cpp has those of attention, linear_bindings.cpp those of
// products, and module.cpp has the others and registers all of them.
#pragma once

#define PY_SSIZE_T_CLEAN
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
PyObject *py_packed_linear(PyObject *, PyObject *args);
PyObject *py_packed_linears(PyObject *, PyObject *args);
PyObject *py_decode(PyObject *, PyObject *args);
