// What cuda_runtime_api.h needs of the compiler's own header, which comes with nvcc and not with torch.
#pragma once

#define __host__
#define __device__
#define __global__
#define __no_return__ __attribute__((noreturn))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __specialization_static static
#define __CUDA_ARCH_HAS_FEATURE__(feature) 0
#define CUDARTAPI
#define CUDARTAPI_CDECL
