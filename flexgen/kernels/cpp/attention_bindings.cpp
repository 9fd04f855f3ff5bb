// Functions for Python: attention over pages, over a shared prefix, and over chosen tokens.
#include "bindings.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>

#include "pool.h"
#include "tape.h"

namespace {

constexpr int64_t MIN_SPLIT_TOKENS = 128;

void attend(Attention &job, const Variant &now, int threads) {
    if (job.length > job.pages.back().begin + job.pages.back().tokens)
        throw std::out_of_range("the cache has no room for another token");
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
    if (job.starts) {  // a row without tokens is not visited
        memset(job.out, 0, job.queries() * job.head_dim * element_bytes(job.lse ? Type::float32 : job.type));
        if (job.lse) std::fill_n(job.lse, job.queries(), -INFINITY);
    }
    run_on_threads(threads, [&] { now.attend(job); });
    if (job.splits > 1) now.merge(job);
}

// With few tasks, the tokens are divided too, so that the threads of a large processor all have work.
constexpr int64_t PREFIX_TASKS = 32, PREFIX_SPLIT_TOKENS = 256;

// Keys and values are converted once for the queries of a task.
constexpr int64_t PROMPT_QUERIES = 128;

// Merge the results of the splits of each query.
void merge(const PrefixAttention &job) {
    for (int64_t place = 0; place < job.places(); ++place) {
        float largest = -INFINITY, total = 0.0f, *out = job.out + place * job.head_dim;
        for (int64_t s = 0; s < job.splits; ++s) largest = std::max(largest, job.sums(s)[place]);
        std::fill_n(out, job.head_dim, 0.0f);
        for (int64_t s = 0; s < job.splits; ++s) {
            const float sum = job.sums(s)[place], *values = job.values(s) + place * job.head_dim;
            if (sum == -INFINITY) continue;  // no token
            const float weight = std::exp(sum - largest);
            total += weight;
            for (int64_t i = 0; i < job.head_dim; ++i) out[i] += weight * values[i];
        }
        job.lse[place] = total == 0.0f ? -INFINITY : largest + std::log(total);
        for (int64_t i = 0; total != 0.0f && i < job.head_dim; ++i) out[i] /= total;
    }
}

void attend(PrefixAttention &job, int threads) {
    const int64_t tasks = std::max<int64_t>(job.tasks(), 1), most = job.tokens / PREFIX_SPLIT_TOKENS;
    const int64_t wanted = std::max<int64_t>(std::min((PREFIX_TASKS + tasks - 1) / tasks, most), 1);
    job.split_tokens = (job.tokens + wanted - 1) / wanted;
    job.splits = (job.tokens + job.split_tokens - 1) / job.split_tokens;
    if (job.splits > 1) job.partial.resize(job.splits * job.places() * (job.head_dim + 1));
    const Variant *now = variant;
    const int64_t work = job.queries() * job.kv_heads * job.tokens * job.head_dim / 4;  // as for bytes of memory
    run_on_threads(useful_threads(threads, work), [&job, now] { now->attend_prefix(job); });
    if (job.splits > 1) merge(job);
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

}  // namespace

PyObject *py_decode_attention(PyObject *, PyObject *args) {
    int type, threads;
    long long q, out, lse, starts, ends, slopes, sinks;
    PyObject *keys, *values, *tokens;
    const auto made = std::make_shared<Attention>();
    Attention &job = *made;
    long long rows, heads, kv_heads, fresh, head_dim, length, code_group, head_bytes;
    if (!PyArg_ParseTuple(args, "iLLL(LLLLL)(iLL)O!O!O!LLL(ffLL)i", &type, &q, &out, &lse, &rows, &heads, &kv_heads,
                          &fresh, &head_dim, &job.bits, &code_group, &head_bytes, &PyList_Type, &keys, &PyList_Type,
                          &values, &PyList_Type, &tokens, &length, &starts, &ends, &job.scale, &job.cap,
                          &slopes, &sinks, &threads))
        return nullptr;
    std::vector<int64_t> k, v, n;
    if (!integers(keys, k) || !integers(values, v) || !integers(tokens, n)) return nullptr;
    job.type = (Type)type;
    job.q = (const void *)q;
    job.out = (void *)out;
    job.lse = (float *)lse;
    job.rows = rows;
    job.heads = heads;
    job.kv_heads = kv_heads;
    job.fresh = fresh;
    job.head_dim = head_dim;
    job.length = length;
    job.code_group = code_group;
    job.head_bytes = head_bytes;
    job.starts = (const int64_t *)starts;
    job.ends = (const int64_t *)ends;
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
        // The ends of rows are read, because a tape repeats the call after they have changed.
        made->length = made->ends ? *std::max_element(made->ends, made->ends + made->rows) : length + later;
        attend(*made, *now, most);
    };
    return run("attention", call, threads);
}

PyObject *py_attend_prefix(PyObject *, PyObject *args) {
    int type, threads;
    long long q, k, v, out, lse, rows, heads, kv_heads, fresh, head_dim, tokens, stride, first, positions, slopes;
    PrefixAttention job;
    if (!PyArg_ParseTuple(args, "iLLLLL(LLLLLLL)LL(ffL)i", &type, &q, &k, &v, &out, &lse, &rows, &heads, &kv_heads,
                          &fresh, &head_dim, &tokens, &stride, &first, &positions, &job.scale, &job.cap, &slopes,
                          &threads))
        return nullptr;
    job.type = (Type)type;
    job.q = (const void *)q;
    job.k = (const void *)k;
    job.v = (const void *)v;
    job.out = (float *)out;
    job.lse = (float *)lse;
    job.rows = rows;
    job.heads = heads;
    job.kv_heads = kv_heads;
    job.fresh = fresh;
    job.head_dim = head_dim;
    job.tokens = tokens;
    job.head_stride = stride;
    job.token_stride = head_dim;
    job.first = (const int64_t *)first;
    job.positions = (const int64_t *)positions;
    job.slopes = (const float *)slopes;
    if (!run_once([&] { attend(job, threads); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_attend_prompt(PyObject *, PyObject *args) {
    int type, threads;
    long long q, k, v, out, lse, rows, heads, kv_heads, fresh, head_dim, tokens, row_stride, head_stride, token_stride;
    long long first, slopes, sinks;
    float scale, cap;
    if (!PyArg_ParseTuple(args, "iLLLLL(LLLLLLLLL)L(ffLL)i", &type, &q, &k, &v, &out, &lse, &rows, &heads, &kv_heads,
                          &fresh, &head_dim, &tokens, &row_stride, &head_stride, &token_stride, &first, &scale, &cap,
                          &slopes, &sinks, &threads))
        return nullptr;
    const int64_t before = tokens - fresh, item = element_bytes((Type)type);
    std::deque<PrefixAttention> jobs(rows);  // each is a row
    for (int64_t row = 0; row < rows; ++row) {
        PrefixAttention &job = jobs[row];
        const int64_t new_bytes = row * fresh * heads * head_dim * item, cached_bytes = row * row_stride * item;
        job.type = (Type)type;
        job.q = (const char *)q + new_bytes;
        job.k = (const char *)k + cached_bytes;
        job.v = (const char *)v + cached_bytes;
        job.prompt_out = (char *)out + new_bytes;
        job.out = nullptr;
        job.lse = lse ? (float *)lse + row * heads * fresh : nullptr;
        job.rows = 1;
        job.heads = heads;
        job.kv_heads = kv_heads;
        job.fresh = fresh;
        job.head_dim = head_dim;
        job.tokens = job.split_tokens = tokens;
        job.head_stride = head_stride;
        job.token_stride = token_stride;
        job.first = (const int64_t *)first;
        job.positions = &before;
        job.scale = scale;
        job.cap = cap;
        job.slopes = (const float *)slopes;
        job.sinks = (const float *)sinks;
        job.causal = true;
        job.task_queries = PROMPT_QUERIES;
    }
    const Variant *now = variant;
    const int64_t work = rows * heads * fresh * tokens * head_dim / 4;
    const auto attend = [&] {
        run_on_threads(useful_threads(threads, work), [&jobs, now] {
            for (PrefixAttention &job : jobs) now->attend_prefix(job);
        });
    };
    if (!run_once(attend)) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_merge_parts(PyObject *, PyObject *args) {
    PartsMerge job;
    int type, threads;
    long long rows, heads, fresh, head_dim, out;
    PyObject *parts;
    if (!PyArg_ParseTuple(args, "i(LLLL)LO!i", &type, &rows, &heads, &fresh, &head_dim, &out, &PyList_Type, &parts,
                          &threads))
        return nullptr;
    job.type = (Type)type;
    job.heads = heads;
    job.fresh = fresh;
    job.head_dim = head_dim;
    job.out = (void *)out;
    for (Py_ssize_t n = 0; n < PyList_GET_SIZE(parts); ++n) {
        long long values, lse, row, head, token;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(parts, n), "LL(LLL)", &values, &lse, &row, &head, &token)) return nullptr;
        job.parts.push_back({(const float *)values, (const float *)lse, row, head, token});
    }
    const int64_t token_bytes = (int64_t)job.parts.size() * heads * head_dim * (int64_t)sizeof(float);
    const auto merge = [&, kernel = variant->merge_parts] {
        by_rows(rows * fresh, token_bytes, threads, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    };
    if (!run_once(merge)) return nullptr;
    Py_RETURN_NONE;
}

PyObject *py_choose(PyObject *, PyObject *args) {
    int type, threads;
    long long q, rows, heads, kv_heads, head_dim, length, starts, ends, unit, most, positions, weights;
    PyObject *keys, *tokens;
    Choice job;
    if (!PyArg_ParseTuple(args, "iL(LLLL)O!O!LLLfdLLLLi", &type, &q, &rows, &heads, &kv_heads, &head_dim,
                          &PyList_Type, &keys, &PyList_Type, &tokens, &length, &starts, &ends, &job.scale,
                          &job.share, &unit, &most, &positions, &weights, &threads))
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
    job.ends = (const int64_t *)ends;
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
