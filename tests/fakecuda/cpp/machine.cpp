#include "machine.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <thread>

namespace fakecuda {

namespace {

double from_environment(const char* name, double otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atof(value) : otherwise;
}

std::vector<int> numbers_from_environment(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    std::stringstream text(value ? value : otherwise);
    std::vector<int> numbers;
    for (std::string number; std::getline(text, number, ',');) numbers.push_back(std::atoi(number.c_str()));
    return numbers;
}

constexpr char kGarbage = 0x7b;

uint64_t checksum(const char* data, size_t nbytes) {  // FNV-1a by words
    uint64_t sum = 1469598103934665603ull;
    size_t at = 0;
    for (; at + 8 <= nbytes; at += 8) {
        uint64_t word;
        std::memcpy(&word, data + at, 8);
        sum = (sum ^ word) * 1099511628211ull;
    }
    for (; at < nbytes; at++) sum = (sum ^ uint8_t(data[at])) * 1099511628211ull;
    return sum;
}

bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

bool includes(const Progress& reached, const Stream* stream, long number) {
    auto found = reached.find(stream);
    return found != reached.end() && found->second >= number;
}

}  // namespace

Settings& settings() {
    static Settings all{
        numbers_from_environment("FAKECUDA_CC", "90,75,80,89"),
        size_t(from_environment("FAKECUDA_GIB", 80) * double(1ull << 30)),
        from_environment("FAKECUDA_KERNEL_US", 3) * 1e-6,
        from_environment("FAKECUDA_LINK_GBS", 25) * 1e9,
        -1,
        false,
        false,
    };
    return all;
}

namespace {

// A child that is forked while another thread is in here has no such thread: it gets a lock that nobody holds, over
// state that nobody was changing.
Machine* make_machine() {
    pthread_atfork([] { machine().lock.lock(); },
                   [] { machine().lock.unlock(); },
                   [] { new (&machine().lock) std::recursive_mutex; });
    return new Machine;
}

}  // namespace

Machine& machine() {
    static Machine* one = make_machine();  // never destroyed: torch frees memory until the very end of the process
    return *one;
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void sleep_until(double time) {
    for (double left; (left = time - now()) > 0;) {
        if (left > 2e-4) std::this_thread::sleep_for(std::chrono::duration<double>(left - 1e-4));
    }
}

int& current_device() {
    static thread_local int device = 0;
    return device;
}

cudaError_t& last_error() {
    static thread_local cudaError_t error = cudaSuccess;
    return error;
}

cudaError_t fail(cudaError_t error) {
    last_error() = error;
    return error;
}

Ranges::Range Ranges::remove(const void* begin) {
    auto found = ranges_.find(uintptr_t(begin));
    if (found == ranges_.end()) return {0, 0};
    Range range = found->second;
    ranges_.erase(found);
    return range;
}

bool Ranges::contains(const void* address) const {
    auto after = ranges_.upper_bound(uintptr_t(address));
    if (after == ranges_.begin()) return false;
    --after;
    return uintptr_t(address) < after->first + after->second.nbytes;
}

size_t Ranges::total() const {
    size_t sum = 0;
    for (auto& [begin, range] : ranges_) sum += range.nbytes;
    return sum;
}

Stream& Machine::stream(cudaStream_t handle) {
    bool is_default = handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
    if (!is_default) return *reinterpret_cast<Stream*>(handle);
    Stream& stream = default_streams_[current_device()];
    stream.device = current_device();
    return stream;
}

double Machine::enqueue(Stream& stream, double seconds) {
    stream.enqueued++;
    stream.clock = std::max(stream.clock, now()) + seconds;
    double& last = busy_until_[stream.device];
    last = std::max(last, stream.clock);
    return stream.clock;
}

double Machine::enqueue_copy(Stream& stream, int engine, double seconds) {
    stream.clock = std::max(stream.clock, engine_free_[engine]);
    return engine_free_[engine] = enqueue(stream, seconds);
}

bool Machine::failed() const {
    return settings().fail_after_launches >= 0 && launched_ > settings().fail_after_launches;
}

bool Machine::launch(const std::string& kernel, cudaStream_t handle) {
    std::lock_guard guard(lock);
    if (add_node(stream(handle), settings().kernel_seconds, nullptr, true)) return true;
    launched_++;
    if (failed()) return false;
    counters.launches[kernel]++;
    enqueue(stream(handle), settings().kernel_seconds);
    return true;
}

bool Machine::run(const Graph::Node& node, Stream& stream) {
    std::lock_guard guard(lock);
    if (node.kernel) {
        launched_++;
        counters.graph_kernels++;
    }
    if (failed()) return false;
    enqueue(stream, node.seconds);
    return true;
}

void Machine::count_wait(const char* function) {
    std::lock_guard guard(lock);
    counters.host_waits[function]++;
}

Progress Machine::reached_by(const Stream& stream) const {
    Progress reached = stream.seen;
    reached[&stream] = stream.enqueued;
    return reached;
}

void Machine::download(Stream& stream, void* target, const void* source, size_t nbytes) {
    auto* begin = static_cast<char*>(target);
    auto* data = static_cast<const char*>(source);
    end_overlapping_uploads(stream, begin, nbytes);
    downloads_.push_back({&stream, stream.enqueued, begin, std::vector<char>(data, data + nbytes)});
    std::memset(begin, kGarbage, nbytes);
}

void Machine::upload(Stream& stream, void* target, const void* source, size_t nbytes) {
    auto* begin = static_cast<const char*>(source);
    deliver_overlapping(stream, begin, nbytes);
    std::memmove(target, source, nbytes);
    uploads_.push_back({&stream, stream.enqueued, begin, nbytes, checksum(begin, nbytes)});
}

// What a stream uploads may be what another stream downloads, with no host wait between: it must be ordered behind it.
void Machine::deliver_overlapping(const Stream& stream, const char* begin, size_t nbytes) {
    Progress reached = reached_by(stream);
    auto arrives = [&](Download& download) {
        if (!overlap(download.target, download.data.size(), begin, nbytes)) return false;
        if (!includes(reached, download.stream, download.number)) {
            counters.unordered_copies++;
            return false;
        }
        std::memcpy(download.target, download.data.data(), download.data.size());
        return true;
    };
    downloads_.erase(std::remove_if(downloads_.begin(), downloads_.end(), arrives), downloads_.end());
}

// What a stream downloads may go where another stream's upload comes from, with no host wait between: the same holds.
void Machine::end_overlapping_uploads(const Stream& stream, const char* begin, size_t nbytes) {
    Progress reached = reached_by(stream);
    auto read = [&](Upload& upload) {
        if (!overlap(upload.source, upload.nbytes, begin, nbytes)) return false;
        if (includes(reached, upload.stream, upload.number)) {
            end(upload);
        } else {
            counters.unordered_copies++;
        }
        return true;
    };
    uploads_.erase(std::remove_if(uploads_.begin(), uploads_.end(), read), uploads_.end());
}

void Machine::end(const Upload& upload) {
    if (checksum(upload.source, upload.nbytes) != upload.checksum) counters.overwritten_uploads++;
}

void Machine::finish(const Progress& reached) {
    auto arrived = [&](Download& download) {
        if (!includes(reached, download.stream, download.number)) return false;
        std::memcpy(download.target, download.data.data(), download.data.size());
        return true;
    };
    auto read = [&](Upload& upload) {
        if (!includes(reached, upload.stream, upload.number)) return false;
        end(upload);
        return true;
    };
    downloads_.erase(std::remove_if(downloads_.begin(), downloads_.end(), arrived), downloads_.end());
    uploads_.erase(std::remove_if(uploads_.begin(), uploads_.end(), read), uploads_.end());
}

void Machine::finish_all(int device) {
    Progress everything;
    auto add = [&](const Stream* stream) {
        if (stream->device == device) everything[stream] = stream->enqueued;
    };
    for (auto& download : downloads_) add(download.stream);
    for (auto& upload : uploads_) add(upload.stream);
    finish(everything);
}

void Machine::release_pinned(const void* begin, size_t nbytes) {
    auto* first = static_cast<const char*>(begin);
    auto download_in = [&](Download& d) { return overlap(d.target, d.data.size(), first, nbytes); };
    auto upload_in = [&](Upload& u) { return overlap(u.source, u.nbytes, first, nbytes); };
    size_t before = downloads_.size() + uploads_.size();
    downloads_.erase(std::remove_if(downloads_.begin(), downloads_.end(), download_in), downloads_.end());
    uploads_.erase(std::remove_if(uploads_.begin(), uploads_.end(), upload_in), uploads_.end());
    counters.released_in_flight += long(before - downloads_.size() - uploads_.size());
}

}  // namespace fakecuda
