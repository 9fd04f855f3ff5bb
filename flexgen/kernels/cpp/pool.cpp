#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

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

// Waits for another thread without sleeping. Other processes get the core from time to time.
class Spin {
public:
    void wait() {
        if (++turns_ % TURNS == 0) return std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

private:
    static constexpr unsigned TURNS = 1024;
    unsigned turns_ = 0;
};

// Prefetches the beginning of a stream, a few lines at a time.
class Prefetcher {
public:
    explicit Prefetcher(int number) : number_(number) {}

    // Continue with `next`, unless it is null. Returns whether lines were left.
    bool work(const Streams *next) {
        if (next != streams_) {
            streams_ = next;
            at_ = next && number_ < Streams::MOST ? next->begins[number_].load(std::memory_order_relaxed) : nullptr;
            left_ = at_ ? MOST : 0;
        }
        for (int n = 0; n < AT_ONCE && left_ > 0; ++n, at_ += LINE, left_ -= LINE) __builtin_prefetch(at_, 0, 2);
        return left_ > 0;
    }

private:
    static constexpr int64_t LINE = 64, MOST = 128 << 10;  // bytes; a part of an L2 cache
    static constexpr int AT_ONCE = 8;
    const int number_;
    const Streams *streams_ = nullptr;
    const uint8_t *at_ = nullptr;
    int64_t left_ = 0;
};

thread_local int number = -1;  // of this thread in its team

// Threads that wait for the work of a leader. A thread that is late, because another process has its core, is not waited
// for.
class Team {
public:
    // Called by the leader.
    void run(int threads, const std::function<void()> &work) {
        work_ = &work;
        const uint64_t round = (state_.load(std::memory_order_relaxed) / ROUND + 1) * ROUND;
        state_.store(round + std::min(threads - 1, MOST) * PLACE, std::memory_order_release);
        attempt(work);
        state_.fetch_and(~(ROUND - PLACE), std::memory_order_relaxed);  // no places
        for (Spin spin; state_.load(std::memory_order_acquire) % PLACE;) wait(spin, prefetcher_);
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }
    void end() { over_.store(true, std::memory_order_release); }
    void read_next(const Streams *next) { next_.store(next, std::memory_order_relaxed); }

    // Called by each of the others: do the leader's work until the end.
    void serve() {
        number = 1 + others_.fetch_add(1, std::memory_order_relaxed);
        Prefetcher prefetcher(number);
        uint64_t last = 0;  // the round that this thread took part in
        for (Spin spin; !over_.load(std::memory_order_acquire);) {
            uint64_t state = state_.load(std::memory_order_relaxed);
            const bool place = state / ROUND != last && state % ROUND >= PLACE;
            if (!place || !state_.compare_exchange_weak(state, state - PLACE + 1, std::memory_order_acquire)) {
                wait(spin, prefetcher);
                continue;
            }
            last = state / ROUND;
            attempt(*work_);
            state_.fetch_sub(1, std::memory_order_release);
        }
        number = -1;
    }

private:
    static constexpr uint64_t PLACE = 1 << 16, ROUND = PLACE << 16;
    static constexpr int MOST = PLACE - 1;

    void wait(Spin &spin, Prefetcher &prefetcher) {
        if (!prefetcher.work(next_.load(std::memory_order_relaxed))) spin.wait();
    }

    void attempt(const std::function<void()> &work) {
        try {
            work();
        } catch (...) {
            std::lock_guard<std::mutex> hold(mutex_);
            error_ = std::current_exception();
        }
    }

    // The number of threads that work, the places for others (PLACE each), and the number of the round (ROUND).
    alignas(64) std::atomic<uint64_t> state_{0};
    std::atomic<bool> over_{false};
    std::atomic<int> others_{0};
    std::atomic<const Streams *> next_{nullptr};
    Prefetcher prefetcher_{0};  // of the leader
    const std::function<void()> *work_ = nullptr;
    std::mutex mutex_;  // guards error_
    std::exception_ptr error_;
};

thread_local Team *led = nullptr;  // by this thread

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
    if (led) return led->run(threads, work);
    if (!region) return pool->run(threads, work);
    Errand errand;
    errand.work = &work;
    region(Errand::run, &errand, (unsigned)threads, 0);
    if (errand.error) std::rethrow_exception(errand.error);
}

void run_with_team(int threads, const std::function<void()> &lead) {
    if (threads <= 1 || led) return lead();
    Team team;
    const auto leader = std::this_thread::get_id();
    run_on_threads(threads, [&] {
        if (std::this_thread::get_id() != leader) return team.serve();
        struct Leading {
            Leading(Team *team) {
                led = team;
                number = 0;
            }
            ~Leading() {
                led->end();
                led = nullptr;
                number = -1;
            }
        } leading(&team);
        lead();
    });
}

int team_number() { return number; }

void read_next(const Streams *next) {
    if (led) led->read_next(next);
}
