// The driver library that torch opens as libcuda.so.1. Calls succeed and do nothing.
#include <cstring>

extern "C" {

int cuInit(unsigned) {
    return 0;
}

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}

int cuDeviceGet(int* device, int number) {
    *device = number;
    return 0;
}

int cuDeviceGetCount(int* count) {
    *count = 1;
    return 0;
}

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    if (flags) *flags = 0;
    if (active) *active = 1;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = reinterpret_cast<void*>(1);
    return 0;
}

int cuCtxGetCurrent(void** context) {
    *context = reinterpret_cast<void*>(1);
    return 0;
}

int cuCtxSetCurrent(void*) {
    return 0;
}

int cuCtxGetDevice(int* device) {
    *device = 0;
    return 0;
}

int cuGetErrorString(int, const char** text) {
    *text = "an error of the simulated CUDA driver";
    return 0;
}

int cuGetErrorName(int error, const char** text) {
    return cuGetErrorString(error, text);
}

#define NOTHING(name) \
    int name() { return 0; }

NOTHING(cuModuleLoadData)
NOTHING(cuModuleLoadDataEx)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleUnload)
NOTHING(cuLaunchKernel)
NOTHING(cuLaunchCooperativeKernel)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncGetAttribute)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cuLinkCreate)
NOTHING(cuLinkAddData)
NOTHING(cuLinkComplete)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuPointerGetAttribute)
NOTHING(cuDeviceGetAttribute)
NOTHING(cuMemGetAllocationGranularity)
NOTHING(cuMemCreate)
NOTHING(cuMemAddressReserve)
NOTHING(cuMemMap)
NOTHING(cuMemSetAccess)
NOTHING(cuMemUnmap)
NOTHING(cuMemRelease)
NOTHING(cuMemAddressFree)
NOTHING(cuMemRetainAllocationHandle)
NOTHING(cuMemExportToShareableHandle)
NOTHING(cuMemImportFromShareableHandle)
NOTHING(cuMemsetD32Async)
NOTHING(cuStreamWriteValue32_v2)
NOTHING(cuGreenCtxCreate)
NOTHING(cuCtxFromGreenCtx)
NOTHING(cuMulticastCreate)
NOTHING(cuMulticastAddDevice)
NOTHING(cuMulticastBindMem)
NOTHING(cuMulticastUnbind)

int do_nothing() {
    return 0;
}

int cuGetProcAddress(const char* name, void** function, int, unsigned long long) {
    bool state = !std::strcmp(name, "cuDevicePrimaryCtxGetState");
    *function = state ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState) : reinterpret_cast<void*>(do_nothing);
    return 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* result) {
    if (result) *result = 0;
    return cuGetProcAddress(name, function, version, flags);
}

}  // extern "C"
