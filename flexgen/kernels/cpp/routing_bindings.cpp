// Functions for Python: the choices of a router, and the rows and sums of the chosen experts.
#include <cstring>
#include <stdexcept>
#include <string>

#include "pool.h"
#include "tape.h"

PyObject *py_route(PyObject *, PyObject *args) {
    Routing job;
    int type, sigmoid, scores_all, normalised;
    long long rows, experts, top_k, logits, correction, tokens, factors, places, ends;
    if (!PyArg_ParseTuple(args, "i(LLL)LL(pppff)LLLL", &type, &rows, &experts, &top_k, &logits, &correction, &sigmoid,
                          &scores_all, &normalised, &job.least_sum, &job.scale, &tokens, &factors, &places, &ends))
        return nullptr;
    job.type = (Type)type;
    job.rows = rows;
    job.experts = experts;
    job.top_k = top_k;
    job.logits = (const void *)logits;
    job.correction = (const float *)correction;
    job.sigmoid = sigmoid;
    job.scores_all = scores_all;
    job.normalised = normalised;
    job.tokens = (int64_t *)tokens;
    job.factors = (float *)factors;
    job.places = (int64_t *)places;
    job.ends = (int32_t *)ends;
    return run("route", [job, kernel = variant->route](int64_t, int) { kernel(job); }, 1);
}

PyObject *py_gather_rows(PyObject *, PyObject *args) {
    long long rows, nbytes, x, count, indices, y;
    if (!PyArg_ParseTuple(args, "LLLLLL", &rows, &nbytes, &x, &count, &indices, &y)) return nullptr;
    const auto work = [=](int64_t, int) {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t index = ((const int64_t *)indices)[row];
            if (index < 0 || index >= count) throw std::out_of_range("row " + std::to_string(index) + " of " + std::to_string(count));
            memcpy((char *)y + row * nbytes, (const char *)x + index * nbytes, nbytes);
        }
    };
    return run("gather_rows", work, 1);
}

PyObject *py_sum_experts(PyObject *, PyObject *args) {
    ExpertSum job;
    int type, wide, threads;
    long long rows, top_k, size, x, factors, places, out;
    if (!PyArg_ParseTuple(args, "ip(LLL)LLLLi", &type, &wide, &rows, &top_k, &size, &x, &factors, &places, &out,
                          &threads))
        return nullptr;
    job.type = (Type)type;
    job.wide = wide;
    job.rows = rows;
    job.top_k = top_k;
    job.size = size;
    job.x = (const void *)x;
    job.factors = (const float *)factors;
    job.places = (const int64_t *)places;
    job.out = (void *)out;
    const auto work = [job, kernel = variant->sum_experts](int64_t, int most) {
        by_rows(job.rows, job.top_k * job.size * element_bytes(job.type), most,
                [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    };
    return run("sum_experts", work, threads);
}
