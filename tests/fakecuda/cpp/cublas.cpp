// cuBLAS and cuBLASLt: products count as one kernel each and write nothing.
#include <cstdlib>
#include <cstring>

#include "machine.h"

using namespace fakecuda;

namespace {

constexpr int kSuccess = 0, kExecutionFailed = 13;

struct Handle {
    cudaStream_t stream = nullptr;
    int math_mode = 0;
    int pointer_mode = 0;
};

Handle& handle_of(void* handle) {
    return *static_cast<Handle*>(handle);
}

int product(const char* name, cudaStream_t stream) {
    return machine().launch(name, stream) ? kSuccess : kExecutionFailed;
}

int make_descriptor(void** descriptor) {
    *descriptor = std::calloc(1, 64);
    return kSuccess;
}

int free_descriptor(void* descriptor) {
    std::free(descriptor);
    return kSuccess;
}

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
    *handle = new Handle;
    return kSuccess;
}

int cublasDestroy_v2(void* handle) {
    delete &handle_of(handle);
    return kSuccess;
}

int cublasSetStream_v2(void* handle, cudaStream_t stream) {
    handle_of(handle).stream = stream;
    return kSuccess;
}

int cublasSetWorkspace_v2(void*, void*, size_t) {
    return kSuccess;
}

int cublasSetMathMode(void* handle, int mode) {
    handle_of(handle).math_mode = mode;
    return kSuccess;
}

int cublasGetMathMode(void* handle, int* mode) {
    *mode = handle_of(handle).math_mode;
    return kSuccess;
}

int cublasSetPointerMode_v2(void* handle, int mode) {
    handle_of(handle).pointer_mode = mode;
    return kSuccess;
}

int cublasGetPointerMode_v2(void* handle, int* mode) {
    *mode = handle_of(handle).pointer_mode;
    return kSuccess;
}

int cublasSetSmCountTarget(void*, int) {
    return kSuccess;
}

// Their operands are not looked at, so one signature serves all.
#define PRODUCT(name) \
    int name(void* handle, ...) { return product(#name, handle_of(handle).stream); }

PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)

size_t cublasLtGetVersion() {
    return 130100;
}

int cublasLtMatmulDescCreate(void** descriptor, int, int) {
    return make_descriptor(descriptor);
}

int cublasLtMatmulDescDestroy(void* descriptor) {
    return free_descriptor(descriptor);
}

int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) {
    return kSuccess;
}

int cublasLtMatmulPreferenceCreate(void** descriptor) {
    return make_descriptor(descriptor);
}

int cublasLtMatmulPreferenceDestroy(void* descriptor) {
    return free_descriptor(descriptor);
}

int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) {
    return kSuccess;
}

int cublasLtMatrixLayoutCreate(void** descriptor, int, uint64_t, uint64_t, int64_t) {
    return make_descriptor(descriptor);
}

int cublasLtMatrixLayoutDestroy(void* descriptor) {
    return free_descriptor(descriptor);
}

int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) {
    return kSuccess;
}

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* found) {
    constexpr size_t kResultBytes = 96;  // of cublasLtMatmulHeuristicResult_t
    std::memset(results, 0, kResultBytes);
    *found = 1;
    return kSuccess;
}

int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, cudaStream_t stream) {
    return product("cublasLtMatmul", stream);
}

}  // extern "C"
