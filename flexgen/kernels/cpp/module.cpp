// flexgen.kernels._native: the kernels for Python, with addresses as integers. The callers in flexgen/kernels/*.py
// check types, shapes and contiguity, because this module cannot.
#include "bindings.h"

#include <algorithm>
#include <atomic>

#include "pool.h"
#include "tape.h"

const Variant *variant = nullptr;

namespace {

const Variant *const VARIANTS[] = {  // best first
#ifdef FLEXGEN_X86
    &avx512_bf16_variant, &avx512_variant, &avx2_variant,
#endif
    &baseline_variant,
};

PyObject *groupwise(PyObject *args, bool pack) {
    Groupwise job;
    int type, scale_type, threads;
    long long group, groups, x, packed, scales, minimums;
    if (!PyArg_ParseTuple(args, "iiiLLLLLLi", &type, &scale_type, &job.bits, &group, &groups, &x, &packed,
                          &scales, &minimums, &threads))
        return nullptr;
    job.type = (Type)type;
    job.scale_type = (Type)scale_type;
    job.group = group;
    job.groups = groups;
    job.x = (void *)x;
    job.packed = (uint8_t *)packed;
    job.scales = (void *)scales;
    job.minimums = (void *)minimums;
    const int64_t group_bytes = group * element_bytes(job.type);
    const int64_t piece = std::max<int64_t>(1, PIECE_BYTES / group_bytes);
    const auto work = pack ? variant->quantise : variant->dequantise;
    std::atomic<int64_t> claimed{0};
    const auto claim = [&] {
        for (int64_t begin; (begin = claimed.fetch_add(piece)) < job.groups;)
            work(job, begin, std::min(begin + piece, job.groups));
    };
    const int useful = useful_threads(threads, groups * group_bytes);
    if (!run_once([&] { run_on_threads(useful, claim); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_quantise(PyObject *, PyObject *args) { return groupwise(args, true); }
PyObject *py_dequantise(PyObject *, PyObject *args) { return groupwise(args, false); }

PyObject *py_read(PyObject *, PyObject *args) {
    long long address, nbytes;
    int threads;
    if (!PyArg_ParseTuple(args, "LLi", &address, &nbytes, &threads)) return nullptr;
    const int64_t piece = 1 << 20;
    std::atomic<int64_t> claimed{0};
    std::atomic<uint32_t> sum{0};
    const auto claim = [&] {
        for (int64_t begin; (begin = claimed.fetch_add(piece)) + piece <= nbytes;)
            sum ^= variant->read((const uint8_t *)address + begin, piece);
    };
    if (!without_gil([&] { run_on_threads(threads, claim); })) return nullptr;
    return PyLong_FromUnsignedLong(sum);
}

PyObject *py_multiply_registers(PyObject *, PyObject *args) {
    long long steps;
    int threads;
    if (!PyArg_ParseTuple(args, "Li", &steps, &threads)) return nullptr;
    std::atomic<int64_t> claimed{0}, operations{0};
    const auto claim = [&] {
        while (claimed.fetch_add(1) < threads) operations += variant->multiply_registers(steps);
    };
    if (!without_gil([&] { run_on_threads(threads, claim); })) return nullptr;
    return PyLong_FromLongLong(operations);
}

PyObject *py_variants(PyObject *, PyObject *) {
    PyObject *names = PyList_New(0);
    for (const Variant *each : VARIANTS) {
        if (!names || !each->supported()) continue;
        PyObject *name = PyUnicode_FromString(each->name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyObject *py_variant(PyObject *, PyObject *) { return PyUnicode_FromString(variant->name); }

PyObject *py_set_variant(PyObject *, PyObject *name) {
    const char *wanted = PyUnicode_AsUTF8(name);
    if (!wanted) return nullptr;
    for (const Variant *each : VARIANTS) {
        if (strcmp(each->name, wanted) || !each->supported()) continue;
        variant = each;
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "no variant %s on this processor", wanted);
}

PyMethodDef METHODS[] = {
    {"decode_attention", py_decode_attention, METH_VARARGS, nullptr},
    {"choose", py_choose, METH_VARARGS, nullptr},
    {"attend_prefix", py_attend_prefix, METH_VARARGS, nullptr},
    {"attend_prompt", py_attend_prompt, METH_VARARGS, nullptr},
    {"merge_parts", py_merge_parts, METH_VARARGS, nullptr},
    {"attend_chosen", py_attend_chosen, METH_VARARGS, nullptr},
    {"quantise", py_quantise, METH_VARARGS, nullptr},
    {"dequantise", py_dequantise, METH_VARARGS, nullptr},
    {"packed_linear", py_packed_linear, METH_VARARGS, nullptr},
    {"packed_linears", py_packed_linears, METH_VARARGS, nullptr},
    {"grouped_linear", py_grouped_linear, METH_VARARGS, nullptr},
    {"route", py_route, METH_VARARGS, nullptr},
    {"gather_rows", py_gather_rows, METH_VARARGS, nullptr},
    {"sum_experts", py_sum_experts, METH_VARARGS, nullptr},
    {"decode", py_decode, METH_VARARGS, nullptr},
    {"rms_norm", py_rms_norm, METH_VARARGS, nullptr},
    {"rotate", py_rotate, METH_VARARGS, nullptr},
    {"silu_product", py_silu_product, METH_VARARGS, nullptr},
    {"add", py_add, METH_VARARGS, nullptr},
    {"largest", py_largest, METH_VARARGS, nullptr},
    {"store_tokens", py_store_tokens, METH_VARARGS, nullptr},
    {"record", py_record, METH_NOARGS, nullptr},
    {"end_record", py_end_record, METH_NOARGS, nullptr},
    {"replay", py_replay, METH_VARARGS, nullptr},
    {"profile", py_profile, METH_VARARGS, nullptr},
    {"read", py_read, METH_VARARGS, nullptr},
    {"multiply_registers", py_multiply_registers, METH_VARARGS, nullptr},
    {"variants", py_variants, METH_NOARGS, nullptr},
    {"variant", py_variant, METH_NOARGS, nullptr},
    {"set_variant", py_set_variant, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_native", "Kernels for the CPU.", -1, METHODS, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    for (const Variant *each : VARIANTS) {
        if (!each->supported()) continue;
        variant = each;
        break;
    }
    PyObject *module = PyModule_Create(&MODULE);
    unrecordable = PyErr_NewException("flexgen.kernels._native.Unrecordable", nullptr, nullptr);
    if (!module || !unrecordable || PyModule_AddObjectRef(module, "Unrecordable", unrecordable) < 0) Py_CLEAR(module);
    return module;
}
