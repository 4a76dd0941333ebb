/* Devices, streams, events, memory and modules: one call of the driver each, in the device's primary context. */
#include "driver.h"

#include <string.h>

/* Runs CALL with the device's context current. */
#define IN_CONTEXT(call)                  \
    do {                                  \
        int code = kvc_enter(driver, device); \
        if (code) return code;            \
        code = (call);                    \
        return kvc_leave(driver, code);   \
    } while (0)

static int attribute(const kvc_driver *driver, CUdevice device, int which, int32_t *out) {
    int value = 0;
    int code = driver->cuDeviceGetAttribute(&value, which, device);
    *out = value;
    return code;
}

/* Needs no context: looking at a device must not make one, which takes hundreds of MB. */
int kvc_device(kvc_driver *driver, int number, kvc_device_info *out) {
    CUdevice device;
    size_t total = 0;
    int32_t pitch = 0;
    if (!driver || !out) return KVC_BAD_ARGUMENT;
    if (number < 0 || number >= driver->devices) return KVC_NO_SUCH_DEVICE;
    memset(out, 0, sizeof *out);
    int code = driver->cuDeviceGet(&device, number);
    if (!code) code = driver->cuDeviceGetName(out->name, (int)sizeof out->name, device);
    if (!code) code = driver->cuDeviceGetPCIBusId(out->pci_bus_id, (int)sizeof out->pci_bus_id, device);
    if (!code) code = driver->cuDeviceTotalMem(&total, device);
    if (!code) code = attribute(driver, device, CU_DEVICE_ATTRIBUTE_MAX_PITCH, &pitch);
    if (!code) code = attribute(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &out->compute_major);
    if (!code) code = attribute(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &out->compute_minor);
    if (!code) code = attribute(driver, device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &out->multiprocessors);
    if (!code) code = attribute(driver, device, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, &out->copy_engines);
    if (!code) code = attribute(driver, device, CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, &out->host_register);
    if (!code) code = attribute(driver, device, CU_DEVICE_ATTRIBUTE_INTEGRATED, &out->integrated);
    out->total_bytes = total;
    out->max_pitch = (uint64_t)pitch;
    return code;
}

int kvc_memory_info(kvc_driver *driver, int device, uint64_t *free_bytes, uint64_t *total_bytes) {
    size_t left = 0, total = 0;
    if (!free_bytes || !total_bytes) return KVC_BAD_ARGUMENT;
    int code = kvc_enter(driver, device);
    if (code) return code;
    code = driver->cuMemGetInfo(&left, &total);
    *free_bytes = left;
    *total_bytes = total;
    return kvc_leave(driver, code);
}

int kvc_stream_create(kvc_driver *driver, int device, void **stream) {
    if (!stream) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuStreamCreate((CUstream *)stream, CU_STREAM_NON_BLOCKING));
}

int kvc_stream_destroy(kvc_driver *driver, int device, void *stream) {
    if ((uintptr_t)stream <= 2) return KVC_BAD_ARGUMENT; /* the default streams are nobody's to destroy */
    IN_CONTEXT(driver->cuStreamDestroy((CUstream)stream));
}

int kvc_stream_synchronize(kvc_driver *driver, int device, void *stream) {
    IN_CONTEXT(driver->cuStreamSynchronize((CUstream)stream));
}

int kvc_stream_wait(kvc_driver *driver, int device, void *stream, void *event) {
    if (!event) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuStreamWaitEvent((CUstream)stream, (CUevent)event, 0));
}

int kvc_event_create(kvc_driver *driver, int device, int flags, void **event) {
    if (!event) return KVC_BAD_ARGUMENT;
    /* A thread that waits for one sleeps, and leaves its core to those that compute. */
    const unsigned int how =
        flags & KVC_EVENT_TIMING ? CU_EVENT_BLOCKING_SYNC : CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING;
    IN_CONTEXT(driver->cuEventCreate((CUevent *)event, how));
}

int kvc_event_destroy(kvc_driver *driver, int device, void *event) {
    if (!event) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuEventDestroy((CUevent)event));
}

int kvc_event_record(kvc_driver *driver, int device, void *event, void *stream) {
    if (!event) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuEventRecord((CUevent)event, (CUstream)stream));
}

int kvc_event_query(kvc_driver *driver, int device, void *event, int *done) {
    if (!event || !done) return KVC_BAD_ARGUMENT;
    *done = 0;
    int code = kvc_enter(driver, device);
    if (code) return code;
    code = driver->cuEventQuery((CUevent)event);
    if (!code) *done = 1;
    return kvc_leave(driver, code == CUDA_ERROR_NOT_READY ? 0 : code);
}

int kvc_event_synchronize(kvc_driver *driver, int device, void *event) {
    if (!event) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuEventSynchronize((CUevent)event));
}

int kvc_event_elapsed(kvc_driver *driver, int device, void *from, void *to, float *milliseconds) {
    if (!from || !to || !milliseconds) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuEventElapsedTime(milliseconds, (CUevent)from, (CUevent)to));
}

int kvc_host_register(kvc_driver *driver, int device, void *address, size_t nbytes) {
    if (!address || !nbytes) return KVC_BAD_ARGUMENT;
    /* Portable: pinned for the contexts of all devices, since one pool serves them all. */
    IN_CONTEXT(driver->cuMemHostRegister(address, nbytes, CU_MEMHOSTREGISTER_PORTABLE));
}

int kvc_host_unregister(kvc_driver *driver, int device, void *address) {
    if (!address) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuMemHostUnregister(address));
}

int kvc_memory_allocate(kvc_driver *driver, int device, size_t nbytes, uint64_t *address) {
    if (!nbytes || !address) return KVC_BAD_ARGUMENT;
    *address = 0;
    IN_CONTEXT(driver->cuMemAlloc(address, nbytes));
}

int kvc_memory_free(kvc_driver *driver, int device, uint64_t address) {
    if (!address) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuMemFree(address));
}

int kvc_module_load(kvc_driver *driver, int device, const void *image, void **module) {
    if (!image || !module) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuModuleLoadData((CUmodule *)module, image));
}

int kvc_module_unload(kvc_driver *driver, int device, void *module) {
    if (!module) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuModuleUnload((CUmodule)module));
}

int kvc_module_function(kvc_driver *driver, int device, void *module, const char *name, void **function) {
    if (!module || !name || !function) return KVC_BAD_ARGUMENT;
    IN_CONTEXT(driver->cuModuleGetFunction((CUfunction *)function, (CUmodule)module, name));
}

int kvc_launch(kvc_driver *driver, int device, void *function, const uint32_t grid[3], uint32_t threads, void *stream,
               void **arguments) {
    if (!function || !grid || !threads || !arguments) return KVC_BAD_ARGUMENT;
    if ((uintptr_t)stream <= 1) return KVC_LEGACY_STREAM;
    IN_CONTEXT(driver->cuLaunchKernel((CUfunction)function, grid[0], grid[1], grid[2], threads, 1, 1, 0,
                                      (CUstream)stream, arguments, NULL));
}
