// Products with matrices, and their decoding, for Python.
#include "bindings.h"

#include <algorithm>
#include <atomic>

#include "experts.h"
#include "pool.h"
#include "products.h"
#include "tape.h"

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
    const bool encoded = form != Py_None;
    std::string name = "product of " + std::to_string(in) + " with";
    int64_t outs = 0;
    for (const Matrix &matrix : matrices) {
        name += " " + std::to_string(matrix.out);
        outs += matrix.out;
    }
    const auto streams = streams_of(rows * in * outs * job.bits / 8);
    const auto call = [job, matrices, encoding, encoded, streams, now = variant](int64_t, int most) {
        PackedLinear own = job;
        if (encoded) own.encoding = &encoding;
        multiply(*now, own, matrices, most, streams.get());
    };
    return run(name.c_str(), call, threads, streams);
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
    if (!jobs.empty() && !run_once([&] { multiply_each(now, jobs, useful); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_grouped_linear(PyObject *, PyObject *args) {
    PackedLinear one;
    int type, scale_type, threads;
    long long out, in, group, groups, x, y, ends, table;
    PyObject *form;
    Encoding encoding;
    if (!PyArg_ParseTuple(args, "iii(LLL)LLLLLOi", &type, &scale_type, &one.bits, &out, &in, &group, &groups, &x, &y,
                          &ends, &table, &form, &threads) ||
        !read_encoding(form, encoding))
        return nullptr;
    one.type = (Type)type;
    one.scale_type = (Type)scale_type;
    one.out = out;
    one.in = in;
    one.group = group;
    const bool encoded = form != Py_None;
    const auto work = [=, now = variant](int64_t, int most) {
        const AddressTable at((const int64_t *)table, groups);
        const int64_t x_bytes = in * element_bytes(one.type), y_bytes = out * element_bytes(one.type);
        std::vector<PackedLinear> jobs;
        int64_t nbytes = 0;
        for (int64_t n = 0, begin = 0; n < groups; ++n) {
            const int64_t end = ((const int32_t *)ends)[n];
            if (end == begin) continue;
            PackedLinear job = one;
            if (encoded) job.encoding = &encoding;
            job.rows = end - begin;
            job.x = (const char *)x + begin * x_bytes;
            job.y = (char *)y + begin * y_bytes;
            job.packed = (const uint8_t *)at.values[n];
            job.scales = (const void *)at.scales[n];
            job.minimums = (const void *)at.minimums[n];
            job.bias = (const void *)at.biases[n];
            jobs.push_back(std::move(job));
            nbytes += (end - begin) * out * in * one.bits / 8;
            begin = end;
        }
        if (!jobs.empty()) multiply_each(*now, jobs, useful_threads(most, nbytes));
    };
    const std::string name = "products of " + std::to_string(in) + " with " + std::to_string(out);
    return run(name.c_str(), work, threads, streams_of(in * out * one.bits / 8));  // they stay empty
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
    if (!run_once([&] { run_on_threads(useful, claim); })) return nullptr;
    Py_RETURN_NONE;
}
