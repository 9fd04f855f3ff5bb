// The functions of the module for attention of one new token of each row.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "calls.h"

namespace {

constexpr int64_t MIN_SPLIT_TOKENS = 128;

void attend(Attention &job, const Variant &now, int threads) {
    if (job.length < 1 || job.length > job.pages.back().begin + job.pages.back().tokens)
        throw std::out_of_range("the length of the cache is not within its pages");
    job.claimed = 0;
    job.splits = 1;
    job.partial.clear();
    const int64_t token_bytes = 2 * job.head_bytes;
    threads = useful_threads(threads, job.items() * job.length * token_bytes);
    job.split_tokens = job.length;
    if (threads > 1 && job.items() < 4 * threads) {
        // There are too few rows and heads to keep all threads busy to the end, so divide the tokens too.
        const int64_t wanted = (4 * threads + job.items() - 1) / job.items();
        job.split_tokens = std::max(MIN_SPLIT_TOKENS, (job.length + wanted - 1) / wanted);
        job.splits = (job.length + job.split_tokens - 1) / job.split_tokens;
        if (job.splits > 1) job.partial.resize(job.tasks() * job.partial_size());
    }
    // A row with only padding is not visited.
    if (job.starts) memset(job.out, 0, job.rows * job.heads * job.head_dim * element_bytes(job.type));
    run_on_threads(threads, [&] { now.attend(job); });
    if (job.splits > 1) now.merge(job);
}

PyObject *py_decode_attention(PyObject *, PyObject *args) {
    int type, threads;
    long long q, out, starts, slopes, sinks;
    PyObject *keys, *values, *tokens;
    const auto made = std::make_shared<Attention>();
    Attention &job = *made;
    long long rows, heads, kv_heads, head_dim, length, code_group, head_bytes;
    if (!PyArg_ParseTuple(args, "iLL(LLLL)(iLL)O!O!O!LL(ffLL)i", &type, &q, &out, &rows, &heads, &kv_heads,
                          &head_dim, &job.bits, &code_group, &head_bytes, &PyList_Type, &keys, &PyList_Type,
                          &values, &PyList_Type, &tokens, &length, &starts, &job.scale, &job.cap, &slopes,
                          &sinks, &threads))
        return nullptr;
    std::vector<int64_t> k, v, n;
    if (!integers(keys, k) || !integers(values, v) || !integers(tokens, n)) return nullptr;
    job.type = (Type)type;
    job.q = (const void *)q;
    job.out = (void *)out;
    job.rows = rows;
    job.heads = heads;
    job.kv_heads = kv_heads;
    job.head_dim = head_dim;
    job.length = length;
    job.code_group = code_group;
    job.head_bytes = head_bytes;
    job.starts = (const int64_t *)starts;
    job.slopes = (const float *)slopes;
    job.sinks = (const float *)sinks;
    int64_t total = 0;
    for (size_t i = 0; i < std::min({k.size(), v.size(), n.size()}); ++i) {
        job.pages.push_back({(const void *)k[i], (const void *)v[i], total, n[i]});
        total += n[i];
    }
    if (length < 1 || length > total) {
        return PyErr_Format(PyExc_ValueError, "length %lld, but the pages hold %lld tokens", length,
                            (long long)total);
    }
    const auto call = [made, length, now = variant](int64_t later, int most) {
        made->length = length + later;
        attend(*made, *now, most);
    };
    return run(call, threads);
}

// The addresses of keys or values, and the number of tokens in each page.
bool pages_of(PyObject *addresses, PyObject *tokens, bool keys, std::vector<Page> &pages) {
    std::vector<int64_t> at, n;
    if (!integers(addresses, at) || !integers(tokens, n)) return false;
    int64_t total = 0;
    for (size_t i = 0; i < std::min(at.size(), n.size()); ++i) {
        const void *k = keys ? (const void *)at[i] : nullptr, *v = keys ? nullptr : (const void *)at[i];
        pages.push_back({k, v, total, n[i]});
        total += n[i];
    }
    return true;
}

PyObject *py_choose(PyObject *, PyObject *args) {
    int type, threads;
    long long q, rows, heads, kv_heads, head_dim, length, starts, unit, most, positions, weights;
    PyObject *keys, *tokens;
    Choice job;
    if (!PyArg_ParseTuple(args, "iL(LLLL)O!O!LLfdLLLLi", &type, &q, &rows, &heads, &kv_heads, &head_dim,
                          &PyList_Type, &keys, &PyList_Type, &tokens, &length, &starts, &job.scale, &job.share,
                          &unit, &most, &positions, &weights, &threads))
        return nullptr;
    if (!pages_of(keys, tokens, true, job.pages)) return nullptr;
    job.type = (Type)type;
    job.q = (const void *)q;
    job.rows = rows;
    job.heads = heads;
    job.kv_heads = kv_heads;
    job.head_dim = head_dim;
    job.length = length;
    job.starts = (const int64_t *)starts;
    job.unit = unit;
    job.most = most;
    job.positions = (int64_t *)positions;
    job.weights = (float *)weights;
    const int useful = useful_threads(threads, job.items() * length * head_dim * element_bytes(job.type));
    const Variant *now = variant;
    if (!run_once([&] { run_on_threads(useful, [&job, now] { now->choose(job); }); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_attend_chosen(PyObject *, PyObject *args) {
    int type, threads;
    long long rows, heads, kv_heads, head_dim, most, positions, weights, out;
    PyObject *values, *tokens;
    Chosen job;
    if (!PyArg_ParseTuple(args, "i(LLLL)LLLO!O!Li", &type, &rows, &heads, &kv_heads, &head_dim, &most,
                          &positions, &weights, &PyList_Type, &values, &PyList_Type, &tokens, &out, &threads))
        return nullptr;
    if (!pages_of(values, tokens, false, job.pages)) return nullptr;
    job.type = (Type)type;
    job.rows = rows;
    job.heads = heads;
    job.kv_heads = kv_heads;
    job.head_dim = head_dim;
    job.most = most;
    job.positions = (const int64_t *)positions;
    job.weights = (const float *)weights;
    job.out = (void *)out;
    const int useful = useful_threads(threads, job.items() * most * head_dim * element_bytes(job.type));
    const Variant *now = variant;
    if (!run_once([&] { run_on_threads(useful, [&job, now] { now->attend_chosen(job); }); }))
        return nullptr;
    Py_RETURN_NONE;
}

}  // namespace
