// The simulated machine that the CUDA runtime, the driver and cuBLAS of this folder share.
//
// Device memory is host memory. Copies are real. Kernels take simulated time and write nothing. Each stream has a clock
// in seconds of the host's steady clock: work that is enqueued moves it forward, and a host wait sleeps until it is reached.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <cuda_runtime_api.h>  // last: one of its macros is a word of the standard library

namespace fakecuda {

// Read from the environment once; the last three are set by tests.
struct Settings {
    std::vector<int> compute_capabilities;  // FAKECUDA_CC, one number for each device: "90,75"
    size_t device_bytes;                    // FAKECUDA_GIB, of each device
    double kernel_seconds;                  // FAKECUDA_KERNEL_US
    double link_bandwidth;  // FAKECUDA_LINK_GBS, bytes/s from pinned memory; a quarter of it from pageable memory
    std::atomic<long> fail_after_launches;  // every kernel after this many launches fails; -1: none
    std::atomic<bool> registration_fails;
    std::atomic<bool> capture_fails;

    int devices() const { return int(compute_capabilities.size()); }
};

Settings& settings();

struct Stream;

// How far a stream, or whoever waited for it, knows each stream to have come: the number of its last finished operation.
using Progress = std::unordered_map<const Stream*, long>;

// What one launch of a CUDA graph does: its nodes in the order of their capture, which was on one stream.
struct Graph {
    struct Node {
        double seconds = 0;            // of the stream
        bool kernel = false;
        std::function<void()> effect;  // on memory, or in the test; none for a kernel
    };
    unsigned long long id = 0;
    std::vector<Node> nodes;
};

// A stream between cudaStreamBeginCapture and cudaStreamEndCapture.
struct Capture {
    std::shared_ptr<Graph> graph;
    cudaStreamCaptureMode mode;
    bool invalid = false;  // after a call that no graph can hold
};

struct Stream {
    int device = 0;
    std::unique_ptr<Capture> capture;  // what is enqueued meanwhile becomes nodes, and does nothing
    double clock = 0;
    long enqueued = 0;  // operations so far
    Progress seen;      // what this stream has waited for in others
};

struct Event {
    unsigned flags = 0;
    bool recorded = false;
    double time = 0;
    unsigned long long graph = 0;  // recorded during the capture of this graph; 0: it is no part of one
    Progress reached;              // what is finished once the event is
};

// Disjoint address ranges.
class Ranges {
   public:
    struct Range {
        size_t nbytes;
        int device;
    };
    void add(const void* begin, size_t nbytes, int device = 0) { ranges_[uintptr_t(begin)] = {nbytes, device}; }
    // Removes the range that begins there; nbytes is 0 if there is none.
    Range remove(const void* begin);
    bool contains(const void* address) const;
    size_t total() const;

   private:
    std::map<uintptr_t, Range> ranges_;
};

struct Counters {
    std::map<std::string, long> launches;    // by kernel, without those of graphs
    long graph_launches = 0;
    long graph_kernels = 0;  // of the graphs that were launched
    std::map<std::string, long> host_waits;  // by function of the runtime
    std::map<std::string, long> copied;      // bytes by kind: "h2d pinned", "h2d pageable", "d2h pinned", ...
    std::map<int, long> contexts;            // calls by device that would create its context
    long registrations = 0;                  // successful calls of cudaHostRegister
    long live_events = 0;
    long most_events = 0;
    long overwritten_uploads = 0;  // pinned sources that the host changed before their copy ended
    long released_in_flight = 0;   // pinned buffers that were released before their copy ended
    long unordered_copies = 0;     // copies of pinned memory that another stream's copy still used
};

class Machine {
   public:
    std::recursive_mutex lock;
    Ranges device_memory;
    Ranges pinned_memory;
    std::map<int, size_t> device_used;
    Counters counters;

    Stream& stream(cudaStream_t handle);

    // Moves the stream's clock forward by what one operation takes; returns when it ends.
    double enqueue(Stream& stream, double seconds);
    // One operation of a copy engine: `engine` 0 to the device, 1 from it.
    double enqueue_copy(Stream& stream, int engine, double seconds);

    // A kernel launch, or a node of the graph that the stream captures. False once the device has failed.
    bool launch(const std::string& kernel, cudaStream_t stream);
    // The next node of a graph that is launched, but for its effect. False once the device has failed.
    bool run(const Graph::Node& node, Stream& stream);
    bool failed() const;
    long launched() const { return launched_; }

    // Copies between pinned memory and a device, in flight until a host wait has seen their end.
    //
    // A download's target holds garbage until then, so that whoever reads it too early computes garbage. An upload is
    // read at once, and its source is compared when it ends.
    void download(Stream& stream, void* target, const void* source, size_t nbytes);
    void upload(Stream& stream, void* target, const void* source, size_t nbytes);
    // The host knows that all of this is finished.
    void finish(const Progress& reached);
    void finish_all(int device);
    // When the last operation of the device's streams ends.
    double busy_until(int device) { return busy_until_[device]; }
    Progress reached_by(const Stream& stream) const;
    // A pinned buffer is released.
    void release_pinned(const void* begin, size_t nbytes);

    void count_wait(const char* function);
    void touch(int device) { counters.contexts[device]++; }

   private:
    struct Download {
        const Stream* stream;
        long number;
        char* target;
        std::vector<char> data;
    };
    struct Upload {
        const Stream* stream;
        long number;
        const char* source;
        size_t nbytes;
        uint64_t checksum;
    };
    std::map<int, Stream> default_streams_;  // by device
    double engine_free_[2] = {0, 0};
    std::map<int, double> busy_until_;  // by device
    std::atomic<long> launched_{0};
    std::vector<Download> downloads_;
    std::vector<Upload> uploads_;

    void end(const Upload& upload);
    void end_overlapping_uploads(const Stream& stream, const char* begin, size_t nbytes);
    void deliver_overlapping(const Stream& stream, const char* begin, size_t nbytes);
};

// The next node of the graph that the stream captures; false if it captures none.
bool add_node(Stream& stream, double seconds, std::function<void()> effect, bool kernel = false);
// The error of a call that no thread may make now, because a stream captures; it invalidates the calling thread's own
// capture. cudaSuccess where nothing forbids the call.
cudaError_t forbidden_by_capture();

Machine& machine();
double now();
void sleep_until(double time);

// The device and the last error of the calling thread.
int& current_device();
cudaError_t& last_error();
cudaError_t fail(cudaError_t error);

}  // namespace fakecuda
