// Functions for Python: recording and repeating calls of kernels.
#include "tape.h"

#include <chrono>

thread_local Tape *recorded = nullptr;
PyObject *unrecordable = nullptr;

namespace {

constexpr const char *TAPE = "flexgen.tape";

void free_tape(PyObject *capsule) { delete (Tape *)PyCapsule_GetPointer(capsule, TAPE); }

}  // namespace

PyObject *py_record(PyObject *, PyObject *) {
    delete recorded;
    recorded = new Tape;
    Py_RETURN_NONE;
}

PyObject *py_end_record(PyObject *, PyObject *) {
    Tape *tape = recorded;
    recorded = nullptr;
    if (!tape) return PyErr_Format(PyExc_RuntimeError, "end_record without record");
    PyObject *capsule = PyCapsule_New(tape, TAPE, free_tape);
    if (!capsule) delete tape;
    return capsule;
}

namespace {

typedef std::chrono::steady_clock Clock;

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

// The arguments of `replay` and `profile`.
bool read_replay(PyObject *args, std::vector<const Tape *> &tapes, long long &later, int &threads) {
    PyObject *capsules;
    if (!PyArg_ParseTuple(args, "O!Li", &PyTuple_Type, &capsules, &later, &threads)) return false;
    for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(capsules); ++n) {
        tapes.push_back((const Tape *)PyCapsule_GetPointer(PyTuple_GET_ITEM(capsules, n), TAPE));
        if (!tapes.back()) return false;
    }
    return true;
}

// Repeat the calls of the tapes without the interpreter's lock. `called(call)` is called after each call, `done()` after
// each tape.
template <class Called, class Done>
bool run_tapes(const std::vector<const Tape *> &tapes, int64_t later, int threads, const Called &called, const Done &done) {
    bool shares = false;  // work with other threads
    std::vector<const Streams *> reads;  // of all calls
    for (const Tape *tape : tapes) {
        for (const Call &call : tape->calls) {
            reads.push_back(call.reads.get());
            shares |= call.reads != nullptr;
        }
    }
    const Streams *next = nullptr;  // what is read first after a call
    for (size_t n = reads.size(); n-- > 0;) {
        const Streams *own = reads[n];
        reads[n] = next;
        if (own) next = own;
    }
    const auto lead = [&] {
        auto next = reads.begin();
        for (const Tape *tape : tapes) {
            for (const Call &call : tape->calls) {
                read_next(*next++);
                call.work(later, threads);
                called(call);
            }
            done();
        }
    };
    return without_gil([&] { run_with_team(shares ? threads : 1, lead); });
}

}  // namespace

PyObject *py_replay(PyObject *, PyObject *args) {
    std::vector<const Tape *> tapes;
    long long later;
    int threads;
    if (!read_replay(args, tapes, later, threads)) return nullptr;
    std::vector<double> ends;
    ends.reserve(tapes.size());
    const auto began = Clock::now();
    const auto done = [&] { ends.push_back(seconds_since(began)); };
    if (!run_tapes(tapes, later, threads, [](const Call &) {}, done)) return nullptr;
    PyObject *list = PyList_New((Py_ssize_t)ends.size());
    for (size_t n = 0; list && n < ends.size(); ++n) {
        PyObject *end = PyFloat_FromDouble(ends[n]);
        if (!end) Py_CLEAR(list);
        else PyList_SET_ITEM(list, (Py_ssize_t)n, end);
    }
    return list;
}

PyObject *py_profile(PyObject *, PyObject *args) {
    std::vector<const Tape *> tapes;
    long long later;
    int threads;
    if (!read_replay(args, tapes, later, threads)) return nullptr;
    std::vector<std::pair<const Call *, double>> timed;
    auto began = Clock::now();
    const auto called = [&](const Call &call) {
        timed.push_back({&call, seconds_since(began)});
        began = Clock::now();
    };
    if (!run_tapes(tapes, later, threads, called, [] {})) return nullptr;
    PyObject *list = PyList_New((Py_ssize_t)timed.size());
    for (size_t n = 0; list && n < timed.size(); ++n) {
        PyObject *pair = Py_BuildValue("(sd)", timed[n].first->name.c_str(), timed[n].second);
        if (!pair) Py_CLEAR(list);
        else PyList_SET_ITEM(list, (Py_ssize_t)n, pair);
    }
    return list;
}
