#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

class Pool {
public:
    void run(int threads, const std::function<void()> &work) {
        std::unique_lock<std::mutex> turn(serving_, std::try_to_lock);
        if (!turn.owns_lock()) {
            work();
            return;
        }
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> hold(mutex_);
            work_ = &work;
            error_ = nullptr;
            vacant_ = std::min(threads - 1, size_);
        }
        wake_.notify_all();
        attempt(work);
        // Threads that have not woken by now have no work left.
        std::unique_lock<std::mutex> hold(mutex_);
        vacant_ = 0;
        done_.wait(hold, [this] { return !busy_; });
        if (error_) std::rethrow_exception(error_);
    }

private:
    void grow(int wanted) {
        for (; size_ < wanted; ++size_) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error &) {
                return;  // a limit on threads: use those that exist
            }
        }
    }

    void serve() {
        std::unique_lock<std::mutex> hold(mutex_);
        for (;;) {
            wake_.wait(hold, [this] { return vacant_ > 0; });
            --vacant_;
            ++busy_;
            const auto *work = work_;
            hold.unlock();
            attempt(*work);
            hold.lock();
            if (!--busy_) done_.notify_one();
        }
    }

    void attempt(const std::function<void()> &work) {
        try {
            work();
        } catch (...) {
            std::lock_guard<std::mutex> hold(mutex_);
            error_ = std::current_exception();
        }
    }

    std::mutex serving_;  // held by the caller that is served; guards size_
    int size_ = 0;
    std::mutex mutex_;  // guards the members below
    std::condition_variable wake_, done_;
    const std::function<void()> *work_ = nullptr;
    int vacant_ = 0, busy_ = 0;
    std::exception_ptr error_;
};

// The function with which a compiler enters an OpenMP region. The runtimes of GNU, LLVM and Intel all have it.
typedef void (*Region)(void (*)(void *), void *, unsigned threads, unsigned flags);

Region region_of_torch() {
    void *torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? (Region)dlsym(torch, "GOMP_parallel") : nullptr;
}

struct Errand {
    const std::function<void()> *work;
    std::mutex mutex;
    std::exception_ptr error;

    static void run(void *self) {
        auto *errand = (Errand *)self;
        try {
            (*errand->work)();
        } catch (...) {
            std::lock_guard<std::mutex> hold(errand->mutex);
            errand->error = std::current_exception();
        }
    }
};

Region region = nullptr;
Pool *pool = nullptr;  // never destroyed: its threads may sleep in it until the process ends

void prepare() {
    static const bool done = [] {
        region = region_of_torch();
        pool = new Pool;
        // A child process has no threads after fork, and may have a copy of a locked mutex.
        pthread_atfork(nullptr, nullptr, [] {
            region = nullptr;
            pool = new Pool;
        });
        return true;
    }();
    (void)done;
}

}  // namespace

void run_on_threads(int threads, const std::function<void()> &work) {
    prepare();
    if (threads <= 1) return work();
    if (!region) return pool->run(threads, work);
    Errand errand;
    errand.work = &work;
    region(Errand::run, &errand, (unsigned)threads, 0);
    if (errand.error) std::rethrow_exception(errand.error);
}
