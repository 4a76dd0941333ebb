/* The driver's types and functions, as far as they are used, so that no CUDA header is needed to build.
 * tests/cuda_ext compares every layout, number and signature with cuda.h where that is installed. */
#ifndef KVC_DRIVER_H
#define KVC_DRIVER_H

#include "kvcuda.h"

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;

#if defined(_WIN32)
#define CUDAAPI __stdcall
#else
#define CUDAAPI
#endif

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CU_GET_PROC_ADDRESS_LEGACY_STREAM = 1,
    CU_MEMORYTYPE_HOST = 1,
    CU_MEMORYTYPE_DEVICE = 2,
    CU_MEM_LOCATION_TYPE_DEVICE = 1,
    CU_MEM_LOCATION_TYPE_HOST = 2,
    CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1,
    CU_MEMCPY_SRC_ACCESS_ORDER_ANY = 3,
    CU_STREAM_NON_BLOCKING = 1,
    CU_EVENT_BLOCKING_SYNC = 1,
    CU_EVENT_DISABLE_TIMING = 2,
    CU_MEMHOSTREGISTER_PORTABLE = 1,
    CU_DEVICE_ATTRIBUTE_MAX_PITCH = 11,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18,
    CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT = 40,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED = 99
};

typedef struct {
    size_t srcXInBytes;
    size_t srcY;
    int srcMemoryType;
    const void *srcHost;
    CUdeviceptr srcDevice;
    void *srcArray;
    size_t srcPitch;
    size_t dstXInBytes;
    size_t dstY;
    int dstMemoryType;
    void *dstHost;
    CUdeviceptr dstDevice;
    void *dstArray;
    size_t dstPitch;
    size_t WidthInBytes;
    size_t Height;
} CUDA_MEMCPY2D;

typedef struct {
    int type;
    int id;
} CUmemLocation;

typedef struct {
    int srcAccessOrder;
    CUmemLocation srcLocHint;
    CUmemLocation dstLocHint;
    unsigned int flags;
} CUmemcpyAttributes;

/* X(result, name, version asked for, arguments): each is fetched by cuGetProcAddress in the form of that version. */
#define KVC_FUNCTIONS(X)                                                                                          \
    X(cuGetErrorName, 6000, (CUresult, const char **))                                                            \
    X(cuGetErrorString, 6000, (CUresult, const char **))                                                          \
    X(cuDeviceGetCount, 2000, (int *))                                                                            \
    X(cuDeviceGet, 2000, (CUdevice *, int))                                                                       \
    X(cuDeviceGetName, 2000, (char *, int, CUdevice))                                                             \
    X(cuDeviceGetAttribute, 2000, (int *, int, CUdevice))                                                         \
    X(cuDeviceTotalMem, 3020, (size_t *, CUdevice))                                                               \
    X(cuDeviceGetPCIBusId, 4010, (char *, int, CUdevice))                                                         \
    X(cuDevicePrimaryCtxRetain, 7000, (CUcontext *, CUdevice))                                                    \
    X(cuDevicePrimaryCtxRelease, 11000, (CUdevice))                                                               \
    X(cuCtxPushCurrent, 4000, (CUcontext))                                                                        \
    X(cuCtxPopCurrent, 4000, (CUcontext *))                                                                       \
    X(cuMemGetInfo, 3020, (size_t *, size_t *))                                                                   \
    X(cuMemAlloc, 3020, (CUdeviceptr *, size_t))                                                                  \
    X(cuMemFree, 3020, (CUdeviceptr))                                                                             \
    X(cuMemHostRegister, 6050, (void *, size_t, unsigned int))                                                    \
    X(cuMemHostUnregister, 4000, (void *))                                                                        \
    X(cuMemcpyHtoDAsync, 3020, (CUdeviceptr, const void *, size_t, CUstream))                                     \
    X(cuMemcpyDtoHAsync, 3020, (void *, CUdeviceptr, size_t, CUstream))                                           \
    X(cuMemcpyDtoDAsync, 3020, (CUdeviceptr, CUdeviceptr, size_t, CUstream))                                      \
    X(cuMemcpy2DAsync, 3020, (const CUDA_MEMCPY2D *, CUstream))                                                   \
    X(cuStreamCreate, 2000, (CUstream *, unsigned int))                                                           \
    X(cuStreamDestroy, 4000, (CUstream))                                                                          \
    X(cuStreamSynchronize, 2000, (CUstream))                                                                      \
    X(cuStreamWaitEvent, 3020, (CUstream, CUevent, unsigned int))                                                 \
    X(cuEventCreate, 2000, (CUevent *, unsigned int))                                                             \
    X(cuEventDestroy, 4000, (CUevent))                                                                            \
    X(cuEventRecord, 2000, (CUevent, CUstream))                                                                   \
    X(cuEventQuery, 2000, (CUevent))                                                                              \
    X(cuEventSynchronize, 2000, (CUevent))                                                                        \
    X(cuEventElapsedTime, 2000, (float *, CUevent, CUevent))                                                      \
    X(cuModuleLoadData, 2000, (CUmodule *, const void *))                                                         \
    X(cuModuleUnload, 2000, (CUmodule))                                                                           \
    X(cuModuleGetFunction, 2000, (CUfunction *, CUmodule, const char *))                                          \
    X(cuLaunchKernel, 4000,                                                                                       \
      (CUfunction, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, \
       CUstream, void **, void **))

#define KVC_TYPE(name, version, arguments) typedef CUresult(CUDAAPI *PFN_##name) arguments;
KVC_FUNCTIONS(KVC_TYPE)
#undef KVC_TYPE

/* CUDA 12.8 tells which copy it refused; 13.0 dropped that argument. */
typedef CUresult(CUDAAPI *PFN_batch_12080)(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *,
                                           size_t *, size_t, size_t *, CUstream);
typedef CUresult(CUDAAPI *PFN_batch_13000)(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *,
                                           size_t *, size_t, CUstream);

#define KVC_MAX_DEVICES 64

/* Never written after kvc_open, but for what the lock guards and `batch_refused`, which is atomic. */
struct kvc_driver {
    void *library;
    int version;
    int devices;
#define KVC_MEMBER(name, version, arguments) PFN_##name name;
    KVC_FUNCTIONS(KVC_MEMBER)
#undef KVC_MEMBER
    PFN_batch_12080 batch_12080;
    PFN_batch_13000 batch_13000;
    void *lock;
    CUcontext contexts[KVC_MAX_DEVICES];
    uint64_t max_pitch[KVC_MAX_DEVICES];
    int batch_refused[KVC_MAX_DEVICES];
};

/* Makes the device's primary context current; every success needs one kvc_leave. */
int kvc_enter(kvc_driver *driver, int device);
/* Makes the thread's own context current again. Returns `code`, or what went wrong here when `code` is 0. */
int kvc_leave(kvc_driver *driver, int code);

int kvc_load_int(const int *place);
void kvc_store_int(int *place, int value);

#endif
