// Kernels: registration by the fat binaries of torch's libraries, and launches.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>

#include "machine.h"

using namespace fakecuda;

namespace {

struct Configuration {
    dim3 grid, block;
    size_t shared_memory;
    cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;

std::unordered_map<const void*, std::string>& kernel_names() {
    static auto* names = new std::unordered_map<const void*, std::string>;
    return *names;
}

std::string demangled(const char* name) {
    int status;
    char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    std::string found = text ? text : name;
    std::free(text);
    return found;
}

bool launchable(dim3 grid, dim3 block) {
    bool grid_fits = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535;
    return grid_fits && block.x && block.x * block.y * block.z <= 1024;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, cudaStream_t stream) {
    machine().touch(current_device());
    if (!launchable(grid, block)) return fail(cudaErrorInvalidConfiguration);
    auto found = kernel_names().find(kernel);
    bool launched = machine().launch(found == kernel_names().end() ? "unnamed" : found->second, stream);
    return launched ? cudaSuccess : fail(cudaErrorIllegalAddress);
}

long do_nothing(...) {
    return 0;
}

int primary_context_state(int, unsigned* flags, int* active) {
    if (flags) *flags = 0;
    if (active) *active = 1;
    return 0;
}

int driver_error(int, const char** text) {
    *text = "an error of the simulated CUDA driver";
    return 0;
}

int current_context(void** context) {
    *context = reinterpret_cast<void*>(1);
    return 0;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    return static_cast<void**>(std::malloc(sizeof(void*)));
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*, int*) {
    kernel_names()[kernel] = demangled(name);
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, void* stream) {
    configurations.push_back({grid, block, shared_memory, static_cast<cudaStream_t>(stream)});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
    Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared_memory = last.shared_memory;
    *static_cast<cudaStream_t*>(stream) = last.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(kernel, grid, block, stream);
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(kernel, grid, block, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
    return launch(kernel, config->gridDim, config->blockDim, config->stream);
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    // torch has no kernels of its own for 8.9: such a GPU runs those for 8.6, and CUB takes no other version.
    const int capability = settings().compute_capabilities[current_device()];
    attributes->binaryVersion = attributes->ptxVersion = capability == 89 ? 86 : capability;
    return cudaDeviceGetAttribute(&attributes->maxDynamicSharedSizeBytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                  current_device());
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t,
                                                                   unsigned) {
    *blocks = threads > 1024 ? 1 : 2048 / (threads > 0 ? threads : 1);
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char constants[1 << 20];
    *address = constants;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = reinterpret_cast<void*>(do_nothing);
    if (!std::strcmp(name, "cuDevicePrimaryCtxGetState")) {
        *function = reinterpret_cast<void*>(primary_context_state);
    } else if (!std::strncmp(name, "cuGetError", 10)) {
        *function = reinterpret_cast<void*>(driver_error);
    } else if (!std::strcmp(name, "cuCtxGetCurrent")) {
        *function = reinterpret_cast<void*>(current_context);
    }
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

}  // extern "C"
