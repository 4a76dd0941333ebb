/* kvcuda: what kvembed needs of the CUDA driver, behind a plain C interface.
 *
 * No CUDA header, no CUDA runtime and no torch: the driver is found when `kvc_open` is called, and everything else is an
 * address or a number. So one build serves every torch, every Python and every driver from CUDA 12.0 on.
 *
 * Every function returns 0, or a code that `kvc_error_text` explains: above 0 it is the driver's own CUresult, below 0
 * one of KVC_*. All functions may be called from any thread. A device's primary context (the one torch uses) is
 * current while a call runs, and the thread's own context is current again when it returns.
 */
#ifndef KVCUDA_H
#define KVCUDA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define KVC_API __declspec(dllexport)
#else
#define KVC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_ABI 1

enum {
    KVC_NO_DRIVER = -1,     /* no driver library, or it cannot be loaded */
    KVC_OLD_DRIVER = -2,    /* older than CUDA 12.0, or a function is missing */
    KVC_BAD_ARGUMENT = -3,  /* a strip or an argument that cannot be right; nothing was issued */
    KVC_LEGACY_STREAM = -4, /* copies and kernels on the legacy default stream, which waits for all others */
    KVC_NO_MEMORY = -5,     /* out of host memory */
    KVC_NO_SUCH_DEVICE = -6 /* no device of this number */
};

enum { KVC_TO_HOST = 1, KVC_TO_DEVICE = 2, KVC_ON_DEVICE = 3 };

/* Flags of kvc_copy. */
enum {
    KVC_BATCH = 1,       /* cuMemcpyBatchAsync, where the driver has it */
    KVC_SOURCE_READY = 2 /* host memory to read is complete, and nothing on the stream writes it: may be read early */
};

enum { KVC_EVENT_TIMING = 1 };

/* `rows` rows of `row_bytes` bytes, their beginnings apart by a pitch on each side. */
typedef struct {
    uint64_t dst;
    uint64_t src;
    uint64_t dst_pitch;
    uint64_t src_pitch;
    uint64_t row_bytes;
    uint64_t rows;
} kvc_strip;

/* What kvc_copy did. `refused` is the strip that could not be issued, or that is not right; else UINT64_MAX. */
typedef struct {
    uint64_t strips;       /* issued, in order */
    uint64_t calls;        /* calls of the driver that queued something */
    uint64_t batched;      /* rows that went through cuMemcpyBatchAsync */
    uint64_t refused;
    int32_t batch_error;   /* the driver's answer when it refused a batch and 2-D copies took its place; else 0 */
    int32_t reserved;
} kvc_issued;

typedef struct {
    char name[128];
    char pci_bus_id[32];
    uint64_t total_bytes;
    uint64_t max_pitch;
    int32_t compute_major;
    int32_t compute_minor;
    int32_t multiprocessors;
    int32_t copy_engines;
    int32_t host_register; /* 1 where cuMemHostRegister works */
    int32_t integrated;    /* 1 where device memory is host memory */
} kvc_device_info;

typedef struct kvc_driver kvc_driver;

KVC_API int kvc_abi(void);

/* Loads the driver library: `path`, or the system's when NULL. On failure `text` says why. */
KVC_API int kvc_open(const char *path, kvc_driver **out, char *text, size_t text_size);
/* Gives primary contexts back. Nothing that was made through `driver` may be used afterwards. */
KVC_API void kvc_close(kvc_driver *driver);
KVC_API void kvc_error_text(const kvc_driver *driver, int code, char *name, size_t name_size, char *text,
                            size_t text_size);

KVC_API int kvc_version(const kvc_driver *driver);
/* Arguments of cuMemcpyBatchAsync: 9 (CUDA 12.8), 8 (CUDA 13.0), or 0 where the driver has none. */
KVC_API int kvc_batch_form(const kvc_driver *driver);
/* The driver's answer when it last refused a batch on this device: from then on 2-D copies are used. Else 0. */
KVC_API int kvc_batch_refused(const kvc_driver *driver, int device);
KVC_API int kvc_device_count(const kvc_driver *driver);
KVC_API int kvc_device(kvc_driver *driver, int device, kvc_device_info *out);
KVC_API int kvc_memory_info(kvc_driver *driver, int device, uint64_t *free_bytes, uint64_t *total_bytes);

/* Issues all strips on `stream`. All are looked at before the first is issued. After an error of the driver those
 * before `refused` are queued: their memory must stay until the stream has been waited for. */
KVC_API int kvc_copy(kvc_driver *driver, int device, const kvc_strip *strips, size_t count, int direction, int flags,
                     size_t batch_rows, void *stream, kvc_issued *issued);

KVC_API int kvc_stream_create(kvc_driver *driver, int device, void **stream);
KVC_API int kvc_stream_destroy(kvc_driver *driver, int device, void *stream);
KVC_API int kvc_stream_synchronize(kvc_driver *driver, int device, void *stream);
KVC_API int kvc_stream_wait(kvc_driver *driver, int device, void *stream, void *event);

KVC_API int kvc_event_create(kvc_driver *driver, int device, int flags, void **event);
KVC_API int kvc_event_destroy(kvc_driver *driver, int device, void *event);
KVC_API int kvc_event_record(kvc_driver *driver, int device, void *event, void *stream);
/* `done` is 1 when the event has happened, else 0. */
KVC_API int kvc_event_query(kvc_driver *driver, int device, void *event, int *done);
KVC_API int kvc_event_synchronize(kvc_driver *driver, int device, void *event);
KVC_API int kvc_event_elapsed(kvc_driver *driver, int device, void *from, void *to, float *milliseconds);

KVC_API int kvc_host_register(kvc_driver *driver, int device, void *address, size_t nbytes);
KVC_API int kvc_host_unregister(kvc_driver *driver, int device, void *address);
KVC_API int kvc_memory_allocate(kvc_driver *driver, int device, size_t nbytes, uint64_t *address);
KVC_API int kvc_memory_free(kvc_driver *driver, int device, uint64_t address);

/* `image` is a fat binary, a cubin or PTX with a zero byte at its end. */
KVC_API int kvc_module_load(kvc_driver *driver, int device, const void *image, void **module);
KVC_API int kvc_module_unload(kvc_driver *driver, int device, void *module);
KVC_API int kvc_module_function(kvc_driver *driver, int device, void *module, const char *name, void **function);
/* `arguments` has the address of each of the kernel's arguments; they are copied before the call returns. */
KVC_API int kvc_launch(kvc_driver *driver, int device, void *function, const uint32_t grid[3], uint32_t threads,
                       void *stream, void **arguments);

#ifdef __cplusplus
}
#endif
#endif
