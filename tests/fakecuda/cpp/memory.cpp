// Device memory, pinned host memory, and copies between them.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "machine.h"

using namespace fakecuda;

namespace {

constexpr size_t kGranule = 2 << 20;
constexpr size_t kContextBytes = 460 << 20;  // what a context takes of a device, about
constexpr double kCopySeconds = 4e-6;
constexpr double kDeviceBandwidth = 1e12;

size_t round_up(size_t nbytes, size_t unit) {
    return (nbytes + unit - 1) / unit * unit;
}

size_t free_bytes(int device) {
    size_t used = machine().device_used[device] + kContextBytes;
    return settings().device_bytes > used ? settings().device_bytes - used : 0;
}

}  // namespace

extern "C" {

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    *free = free_bytes(current_device());
    *total = settings().device_bytes;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t nbytes) {
    if (cudaError_t error = forbidden_by_capture()) return fail(error);
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    int device = current_device();
    machine().touch(device);
    size_t rounded = round_up(nbytes, kGranule);
    if (rounded > free_bytes(device)) return fail(cudaErrorMemoryAllocation);
    void* made = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    machine().device_memory.add(made, rounded, device);
    machine().device_used[device] += rounded;
    *address = made;
    return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
    if (cudaError_t error = forbidden_by_capture()) return fail(error);
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    if (!address) return cudaSuccess;
    std::lock_guard guard(machine().lock);
    machine().count_wait("cudaFree");
    Ranges::Range range = machine().device_memory.remove(address);
    if (!range.nbytes) return fail(cudaErrorInvalidValue);
    machine().device_used[range.device] -= range.nbytes;
    munmap(address, range.nbytes);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t nbytes, unsigned) {
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    *address = std::aligned_alloc(4096, round_up(nbytes, 4096));
    machine().pinned_memory.add(*address, nbytes);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
    std::lock_guard guard(machine().lock);
    Ranges::Range range = machine().pinned_memory.remove(address);
    machine().release_pinned(address, range.nbytes);
    std::free(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, size_t nbytes, unsigned) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    if (settings().registration_fails) return fail(cudaErrorMemoryAllocation);
    if (machine().pinned_memory.contains(address)) return fail(cudaErrorHostMemoryAlreadyRegistered);
    machine().pinned_memory.add(address, nbytes);
    machine().counters.registrations++;
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    Ranges::Range range = machine().pinned_memory.remove(address);
    if (!range.nbytes) return fail(cudaErrorHostMemoryNotRegistered);
    machine().release_pinned(address, range.nbytes);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    std::lock_guard guard(machine().lock);
    *attributes = {};
    auto* unconst = const_cast<void*>(address);
    if (machine().device_memory.contains(address)) {
        attributes->type = cudaMemoryTypeDevice;
        attributes->devicePointer = unconst;
    } else if (machine().pinned_memory.contains(address)) {
        attributes->type = cudaMemoryTypeHost;
        attributes->hostPointer = attributes->devicePointer = unconst;
    } else {
        attributes->type = cudaMemoryTypeUnregistered;
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t nbytes, cudaMemcpyKind, cudaStream_t handle) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    if (!nbytes) return cudaSuccess;
    std::unique_lock guard(machine().lock);
    machine().touch(current_device());
    Stream& stream = machine().stream(handle);
    bool to_device = machine().device_memory.contains(target);
    bool from_device = machine().device_memory.contains(source);
    auto& copied = machine().counters.copied;
    if (to_device && from_device) {
        double seconds = kCopySeconds + 2 * double(nbytes) / kDeviceBandwidth;
        auto copy = [=] { std::memmove(target, source, nbytes); };
        if (add_node(stream, seconds, copy)) return cudaSuccess;
        copied["d2d"] += long(nbytes);
        machine().enqueue(stream, seconds);
        std::memmove(target, source, nbytes);
        return cudaSuccess;
    }
    if (!to_device && !from_device) {
        std::memmove(target, source, nbytes);
        return cudaSuccess;
    }
    if (stream.capture) {  // CUDA takes copies of pinned memory; the engine has none in a graph
        stream.capture->invalid = true;
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    bool pinned = machine().pinned_memory.contains(to_device ? source : target);
    copied[std::string(to_device ? "h2d " : "d2h ") + (pinned ? "pinned" : "pageable")] += long(nbytes);
    double bandwidth = settings().link_bandwidth / (pinned ? 1 : 4);
    double end = machine().enqueue_copy(stream, to_device ? 0 : 1, kCopySeconds + double(nbytes) / bandwidth);
    if (pinned && to_device) {
        machine().upload(stream, target, source, nbytes);
    } else if (pinned) {
        machine().download(stream, target, source, nbytes);
    } else {  // the host waits for a copy of pageable memory
        std::memmove(target, source, nbytes);
        machine().count_wait(to_device ? "pageable copy to the device" : "pageable copy from the device");
        machine().finish(machine().reached_by(stream));
        guard.unlock();
        sleep_until(end);
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t nbytes, cudaMemcpyKind kind) {
    cudaError_t status = cudaMemcpyAsync(target, source, nbytes, kind, nullptr);
    return status ? status : cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t nbytes, cudaStream_t stream) {
    return cudaMemcpyAsync(target, source, nbytes, cudaMemcpyDefault, stream);
}

cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    return cudaSuccess;  // constants of kernels, which do nothing here
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t nbytes, cudaStream_t handle) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    std::lock_guard guard(machine().lock);
    machine().touch(current_device());
    Stream& stream = machine().stream(handle);
    double seconds = kCopySeconds + double(nbytes) / kDeviceBandwidth;
    auto fill = [=] { std::memset(target, value, nbytes); };
    if (add_node(stream, seconds, fill)) return cudaSuccess;
    machine().enqueue(stream, seconds);
    fill();
    return cudaSuccess;
}

cudaError_t cudaMemset(void* target, int value, size_t nbytes) {
    return cudaMemsetAsync(target, value, nbytes, nullptr);
}

}  // extern "C"
