// Products with matrices, and their decoding, for Python.
#include "bindings.h"

#include <algorithm>
#include <atomic>

#include "experts.h"
#include "pool.h"
#include "products.h"

// An encoding, or None. Returns false and sets a Python error for other objects.
static bool read_encoding(PyObject *form, Encoding &to) {
    if (form == Py_None) return true;
    int order, code, scale, divides;
    long long row_bytes, scale_rows;
    if (!PyArg_ParseTuple(form, "iiiLLip", &order, &code, &scale, &row_bytes, &scale_rows, &to.added, &divides))
        return false;
    to.order = (Order)order;
    to.code = (Code)code;
    to.scale = (Scale)scale;
    to.row_bytes = row_bytes;
    to.scale_rows = scale_rows;
    to.divides = divides;
    return true;
}

PyObject *py_packed_linear(PyObject *, PyObject *args) {
    PackedLinear job;
    int type, scale_type, threads;
    long long rows, in, group, x;
    int rounded;
    PyObject *list, *form;
    Encoding encoding;
    if (!PyArg_ParseTuple(args, "iii(LLL)LO!pOi", &type, &scale_type, &job.bits, &rows, &in, &group, &x, &PyList_Type,
                          &list, &rounded, &form, &threads) ||
        !read_encoding(form, encoding))
        return nullptr;
    if (form != Py_None) job.encoding = &encoding;
    job.rounded = rounded;
    job.type = (Type)type;
    job.scale_type = (Type)scale_type;
    job.rows = rows;
    job.in = in;
    job.group = group;
    job.x = (const void *)x;
    std::vector<Matrix> matrices;
    for (Py_ssize_t n = 0; n < PyList_GET_SIZE(list); ++n) {
        long long out, y, bias, packed, scales, minimums;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, n), "LLLLLL", &out, &y, &bias, &packed, &scales, &minimums))
            return nullptr;
        matrices.push_back({out, (char *)y, (const void *)bias, (const uint8_t *)packed, (const void *)scales,
                            (const void *)minimums});
    }
    if (!without_gil([&] { multiply(*variant, job, matrices, threads); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_packed_linears(PyObject *, PyObject *args) {
    PackedLinear one;
    int type, scale_type, threads;
    long long out, in, group;
    PyObject *products, *form;
    Encoding encoding;
    if (!PyArg_ParseTuple(args, "iii(LLL)O!Oi", &type, &scale_type, &one.bits, &out, &in, &group, &PyList_Type,
                          &products, &form, &threads) ||
        !read_encoding(form, encoding))
        return nullptr;
    if (form != Py_None) one.encoding = &encoding;
    one.type = (Type)type;
    one.scale_type = (Type)scale_type;
    one.out = out;
    one.in = in;
    one.group = group;
    one.bias = nullptr;
    std::vector<PackedLinear> jobs;
    int64_t nbytes = 0;
    for (Py_ssize_t n = 0; n < PyList_GET_SIZE(products); ++n) {
        long long rows, x, y, packed, scales, minimums;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(products, n), "LLLLLL", &rows, &x, &y, &packed, &scales, &minimums))
            return nullptr;
        PackedLinear job = one;
        job.rows = rows;
        job.x = (const void *)x;
        job.y = (void *)y;
        job.packed = (const uint8_t *)packed;
        job.scales = (const void *)scales;
        job.minimums = (const void *)minimums;
        jobs.push_back(job);
        nbytes += rows * out * in * one.bits / 8;
    }
    const Variant &now = *variant;
    const int useful = useful_threads(threads, nbytes);
    if (!jobs.empty() && !without_gil([&] { multiply_each(now, jobs, useful); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_decode(PyObject *, PyObject *args) {
    PackedLinear job;
    Encoding encoding;
    int type, scale_type, threads;
    long long out, in, group, y, packed, scales, minimums;
    PyObject *form;
    if (!PyArg_ParseTuple(args, "iii(LLL)LLLLOi", &type, &scale_type, &job.bits, &out, &in, &group, &y, &packed, &scales,
                          &minimums, &form, &threads) ||
        !read_encoding(form, encoding))
        return nullptr;
    job.type = (Type)type;
    job.scale_type = (Type)scale_type;
    job.out = out;
    job.in = in;
    job.group = group;
    job.y = (void *)y;
    job.packed = (const uint8_t *)packed;
    job.scales = (const void *)scales;
    job.minimums = (const void *)minimums;
    job.encoding = &encoding;
    const Variant *now = variant;
    std::atomic<int64_t> claimed{0};
    const auto claim = [&, now] {
        for (int64_t begin; (begin = claimed.fetch_add(ENCODED_BLOCK)) < job.out;)
            now->decode(job, begin, std::min(begin + ENCODED_BLOCK, job.out));
    };
    const int useful = useful_threads(threads, out * in * element_bytes(job.type));
    if (!without_gil([&] { run_on_threads(useful, claim); })) return nullptr;
    Py_RETURN_NONE;
}
