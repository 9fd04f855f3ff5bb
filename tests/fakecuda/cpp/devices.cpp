// Devices, versions and errors.
#include <cstdio>
#include <cstring>

#include "machine.h"

using namespace fakecuda;

namespace {

constexpr int kVersion = 13000;

struct Generation {
    int multiprocessors;
    int threads;           // of a multiprocessor
    size_t shared_memory;  // bytes that a block may ask for
};

Generation generation(int device) {
    switch (settings().compute_capabilities[device]) {
        case 75: return {40, 1024, 65536};
        case 80: return {108, 2048, 166912};
        case 89: return {128, 1536, 101376};
        default: return {132, 2048, 232448};
    }
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    *count = settings().devices();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_device();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= settings().devices()) return fail(cudaErrorInvalidDevice);
    current_device() = device;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = kVersion;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = kVersion;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error();
    last_error() = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() {
    return last_error();
}

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
        default: return "cudaError";
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
        case cudaErrorNotSupported: return "operation not supported";
        default: return "an error of the simulated CUDA runtime";
    }
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (device < 0 || device >= settings().devices()) return fail(cudaErrorInvalidDevice);
    int capability = settings().compute_capabilities[device];
    Generation made = generation(device);
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "Simulated GPU sm_%d", capability);
    properties->totalGlobalMem = settings().device_bytes;
    properties->major = capability / 10;
    properties->minor = capability % 10;
    properties->multiProcessorCount = made.multiprocessors;
    properties->maxThreadsPerMultiProcessor = made.threads;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = made.shared_memory;
    properties->sharedMemPerMultiprocessor = made.shared_memory + 1024;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->l2CacheSize = 40 << 20;
    properties->unifiedAddressing = properties->canMapHostMemory = properties->managedMemory = 1;
    properties->concurrentKernels = 1;
    properties->asyncEngineCount = 2;
    properties->pciBusID = device + 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= settings().devices()) return fail(cudaErrorInvalidDevice);
    int capability = settings().compute_capabilities[device];
    Generation made = generation(device);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(made.shared_memory); break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(made.shared_memory) + 1024; break;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMultiProcessorCount: *value = made.multiprocessors; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = made.threads; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
        case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
        default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
    std::snprintf(text, size_t(length), "0000:%02d:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaProfilerStart() {
    return cudaSuccess;
}

cudaError_t cudaProfilerStop() {
    return cudaSuccess;
}

}  // extern "C"
