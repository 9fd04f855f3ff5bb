// Streams and events.
#include <algorithm>

#include "machine.h"

using namespace fakecuda;

namespace {

Event& event_of(cudaEvent_t handle) {
    return *reinterpret_cast<Event*>(handle);
}

// The host knows that the stream has done all it was given, and waits for that.
cudaError_t wait_for(Stream& stream, const char* function) {
    if (cudaError_t error = forbidden_by_capture()) return fail(error);
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    double end;
    {
        std::lock_guard guard(machine().lock);
        machine().touch(current_device());
        machine().count_wait(function);
        end = stream.clock;
        machine().finish(machine().reached_by(stream));
    }
    sleep_until(end);
    return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int) {
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    auto* stream = new Stream;
    stream->device = current_device();
    *handle = reinterpret_cast<cudaStream_t>(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) {
    return cudaStreamCreateWithPriority(handle, 0, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;  // torch keeps its streams; others' may still be named in an event's progress
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    if (cudaError_t error = forbidden_by_capture()) return fail(error);
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    Stream& stream = machine().stream(handle);
    if (stream.clock > now()) return cudaErrorNotReady;
    machine().finish(machine().reached_by(stream));
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return wait_for(machine().stream(handle), "cudaStreamSynchronize");
}

cudaError_t cudaDeviceSynchronize() {
    if (cudaError_t error = forbidden_by_capture()) return fail(error);
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    int device = current_device();
    double end;
    {
        std::lock_guard guard(machine().lock);
        machine().touch(device);
        machine().count_wait("cudaDeviceSynchronize");
        end = machine().busy_until(device);
        machine().finish_all(device);
    }
    sleep_until(end);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    Event& event = event_of(event_handle);
    if (!event.recorded) return cudaSuccess;
    Stream& stream = machine().stream(handle);
    unsigned long long graph = stream.capture ? stream.capture->graph->id : 0;
    if (event.graph != graph) {  // the rig's graphs are of one stream
        if (stream.capture) stream.capture->invalid = true;
        return fail(cudaErrorStreamCaptureIsolation);
    }
    stream.clock = std::max(stream.clock, event.time);
    for (auto& [other, number] : event.reached) stream.seen[other] = std::max(stream.seen[other], number);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    auto* event = new Event;
    event->flags = flags;
    *handle = reinterpret_cast<cudaEvent_t>(event);
    Counters& counters = machine().counters;
    counters.most_events = std::max(counters.most_events, ++counters.live_events);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) {
    return cudaEventCreateWithFlags(handle, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    std::lock_guard guard(machine().lock);
    delete &event_of(handle);
    machine().counters.live_events--;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    Event& event = event_of(handle);
    Stream& stream = machine().stream(stream_handle);
    event.graph = stream.capture ? stream.capture->graph->id : 0;
    event.time = std::max(stream.clock, now());
    event.reached = machine().reached_by(stream);
    event.recorded = true;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    if (cudaError_t error = forbidden_by_capture()) return fail(error);
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    Event& event = event_of(handle);
    if (event.recorded && event.time > now()) return cudaErrorNotReady;
    machine().finish(event.reached);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    if (cudaError_t error = forbidden_by_capture()) return fail(error);
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    double end;
    {
        std::lock_guard guard(machine().lock);
        machine().touch(current_device());
        machine().count_wait("cudaEventSynchronize");
        Event& event = event_of(handle);
        end = event.time;
        machine().finish(event.reached);
    }
    sleep_until(end);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    Event &start = event_of(start_handle), &end = event_of(end_handle);
    bool untimed = (start.flags | end.flags) & cudaEventDisableTiming;
    if (untimed || !start.recorded || !end.recorded) return fail(cudaErrorInvalidResourceHandle);
    if (start.time > now() || end.time > now()) return fail(cudaErrorNotReady);
    *milliseconds = float((end.time - start.time) * 1e3);
    return cudaSuccess;
}

}  // extern "C"
