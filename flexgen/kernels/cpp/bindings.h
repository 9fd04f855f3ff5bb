// What the functions for Python share. attention_bindings.cpp has those of attention, linear_bindings.cpp those of
// products, elementwise_bindings.cpp those of rows and heads, routing_bindings.cpp those of mixtures, and tape.cpp those of
// recordings. module.cpp has the others and registers all of them.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"

extern const Variant *variant;  // in use

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

// Append the integers of a list. Returns false and sets a Python error if it is none.
inline bool integers(PyObject *list, std::vector<int64_t> &out) {
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

PyObject *py_decode_attention(PyObject *, PyObject *args);
PyObject *py_attend_prefix(PyObject *, PyObject *args);
PyObject *py_attend_prompt(PyObject *, PyObject *args);
PyObject *py_merge_parts(PyObject *, PyObject *args);
PyObject *py_choose(PyObject *, PyObject *args);
PyObject *py_attend_chosen(PyObject *, PyObject *args);
PyObject *py_packed_linear(PyObject *, PyObject *args);
PyObject *py_packed_linears(PyObject *, PyObject *args);
PyObject *py_decode(PyObject *, PyObject *args);
PyObject *py_rms_norm(PyObject *, PyObject *args);
PyObject *py_rotate(PyObject *, PyObject *args);
PyObject *py_silu_product(PyObject *, PyObject *args);
PyObject *py_add(PyObject *, PyObject *args);
PyObject *py_largest(PyObject *, PyObject *args);
PyObject *py_route(PyObject *, PyObject *args);
PyObject *py_gather_rows(PyObject *, PyObject *args);
PyObject *py_sum_experts(PyObject *, PyObject *args);
PyObject *py_grouped_linear(PyObject *, PyObject *args);
PyObject *py_store_tokens(PyObject *, PyObject *args);
PyObject *py_record(PyObject *, PyObject *);
PyObject *py_end_record(PyObject *, PyObject *);
PyObject *py_replay(PyObject *, PyObject *args);
PyObject *py_profile(PyObject *, PyObject *args);
