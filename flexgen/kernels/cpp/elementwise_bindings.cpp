// Functions for Python: kernels that work on each row or each head.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pool.h"
#include "tape.h"

namespace {

// The new key or value of one token of each row, and the pages in which it is stored.
struct NewHeads {
    const char *from;
    int64_t row_stride, head_stride, token_stride;  // bytes
    std::vector<int64_t> pages;  // (rows, kv_heads, page_tokens, head_bytes)

    // Store the token of a row at a position.
    void store(int64_t row, int64_t token, int64_t heads, int64_t page_tokens, int64_t head_bytes,
               int64_t position) const {
        const int64_t page = position / page_tokens, place = position % page_tokens;
        if (page >= (int64_t)pages.size()) throw std::out_of_range("the cache has no room for another token");
        for (int64_t head = 0; head < heads; ++head)
            memcpy((char *)pages[page] + ((row * heads + head) * page_tokens + place) * head_bytes,
                   from + row * row_stride + head * head_stride + token * token_stride, head_bytes);
    }
};

}  // namespace

PyObject *py_rms_norm(PyObject *, PyObject *args) {
    RmsNorm job;
    int type, round_first, threads;
    long long rows, size, x, weight, y;
    if (!PyArg_ParseTuple(args, "ip(LL)LLLffi", &type, &round_first, &rows, &size, &x, &weight, &y, &job.eps,
                          &job.plus, &threads))
        return nullptr;
    job.type = (Type)type;
    job.round_first = round_first;
    job.rows = rows;
    job.size = size;
    job.x = (const void *)x;
    job.weight = (const void *)weight;
    job.y = (void *)y;
    const auto call = [job, kernel = variant->rms_norm](int64_t, int most) {
        by_rows(job.rows, job.size * element_bytes(job.type), most,
                [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    };
    return run("rms_norm", call, threads);
}

PyObject *py_rotate(PyObject *, PyObject *args) {
    Rotation q, k;
    int type, threads;
    long long rows, heads, kv_heads, head_dim, half, q_at, q_stride, k_at, k_stride, factors;
    if (!PyArg_ParseTuple(args, "i(LLLLL)LLLLLi", &type, &rows, &heads, &kv_heads, &head_dim, &half, &q_at, &q_stride,
                          &k_at, &k_stride, &factors, &threads))
        return nullptr;
    q.type = (Type)type;
    q.head_dim = head_dim;
    q.half = half;
    q.factors = (const void *)factors;
    k = q;
    q.heads = heads;
    q.x = (void *)q_at;
    q.stride = q_stride;
    k.heads = kv_heads;
    k.x = (void *)k_at;
    k.stride = k_stride;
    const auto call = [q, k, rows, kernel = variant->rotate](int64_t, int most) {
        by_rows(rows, (q.heads + k.heads) * q.head_dim * element_bytes(q.type), most,
                [&](int64_t begin, int64_t end) {
                    kernel(q, begin, end);
                    kernel(k, begin, end);
                });
    };
    return run("rotate", call, threads);
}

PyObject *py_silu_product(PyObject *, PyObject *args) {
    SiluProduct job;
    int type, threads;
    long long rows, size, gate, up, stride, y, y_stride;
    if (!PyArg_ParseTuple(args, "i(LL)LLLLLi", &type, &rows, &size, &gate, &up, &stride, &y, &y_stride, &threads))
        return nullptr;
    job.type = (Type)type;
    job.rows = rows;
    job.size = size;
    job.gate = (const void *)gate;
    job.up = (const void *)up;
    job.stride = stride;
    job.y = (void *)y;
    job.y_stride = y_stride;
    const auto call = [job, kernel = variant->silu_product](int64_t, int most) {
        by_rows(job.rows, job.size * element_bytes(job.type), most,
                [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    };
    return run("silu", call, threads);
}

PyObject *py_add(PyObject *, PyObject *args) {
    int type, threads;
    long long count, out, x;
    if (!PyArg_ParseTuple(args, "iLLLi", &type, &count, &out, &x, &threads)) return nullptr;
    const auto call = [=, kernel = variant->add](int64_t, int most) {
        // Values are rows of one element.
        by_rows(count, element_bytes((Type)type), most, [&](int64_t begin, int64_t end) {
            kernel((Type)type, (void *)out, (const void *)x, begin, end);
        });
    };
    return run("add", call, threads);
}

PyObject *py_largest(PyObject *, PyObject *args) {
    Largest job;
    int type, threads;
    long long rows, size, x, stride, indices;
    if (!PyArg_ParseTuple(args, "i(LL)LLLi", &type, &rows, &size, &x, &stride, &indices, &threads)) return nullptr;
    job.type = (Type)type;
    job.size = size;
    job.x = (const void *)x;
    job.stride = stride;
    job.indices = (int64_t *)indices;
    const auto call = [job, rows, kernel = variant->largest](int64_t, int most) {
        by_rows(rows, job.size * element_bytes(job.type), most,
                [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    };
    return run("largest", call, threads);
}

PyObject *py_store_tokens(PyObject *, PyObject *args) {
    long long rows, heads, fresh, page_tokens, head_bytes, position, lengths_at, k_at, v_at;
    long long k_row, k_head, k_token, v_row, v_head, v_token;
    PyObject *keys, *values;
    NewHeads k, v;
    if (!PyArg_ParseTuple(args, "(LLLLL)LLL(LLL)O!L(LLL)O!", &rows, &heads, &fresh, &page_tokens, &head_bytes,
                          &position, &lengths_at, &k_at, &k_row, &k_head, &k_token, &PyList_Type, &keys, &v_at, &v_row,
                          &v_head, &v_token, &PyList_Type, &values))
        return nullptr;
    if (!integers(keys, k.pages) || !integers(values, v.pages)) return nullptr;
    k.from = (const char *)k_at;
    k.row_stride = k_row;
    k.head_stride = k_head;
    k.token_stride = k_token;
    v.from = (const char *)v_at;
    v.row_stride = v_row;
    v.head_stride = v_head;
    v.token_stride = v_token;
    const auto call = [=, lengths = (const int64_t *)lengths_at](int64_t later, int) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t token = 0; token < fresh; ++token) {
                const int64_t at = (lengths ? lengths[row] : position + later) + token;
                k.store(row, token, heads, page_tokens, head_bytes, at);
                v.store(row, token, heads, page_tokens, head_bytes, at);
            }
    };
    return run("store_tokens", call, 1);
}
