/* All strided copies of a block in one call. */
#include "driver.h"

#include <string.h>

#define MOST_BATCH_ROWS 1024 /* copies in one cuMemcpyBatchAsync, on the stack: 24 KB */

static int is_wrong(const kvc_strip *s) {
    if (!s->dst || !s->src || !s->row_bytes || !s->rows) return 1;
    if (s->rows > 1) {
        if (s->dst_pitch < s->row_bytes || s->src_pitch < s->row_bytes) return 1;
        uint64_t pitch = s->dst_pitch > s->src_pitch ? s->dst_pitch : s->src_pitch;
        /* The last byte must be an address. */
        if (pitch > UINT64_MAX / s->rows) return 1;
        if (s->dst > UINT64_MAX - pitch * s->rows || s->src > UINT64_MAX - pitch * s->rows) return 1;
        return 0;
    }
    return s->dst > UINT64_MAX - s->row_bytes || s->src > UINT64_MAX - s->row_bytes;
}

/* Rows that touch on both sides are one. */
static kvc_strip joined(const kvc_strip *s) {
    kvc_strip out = *s;
    if (out.rows > 1 && out.dst_pitch == out.row_bytes && out.src_pitch == out.row_bytes) {
        out.row_bytes *= out.rows;
        out.rows = 1;
    }
    return out;
}

static int copy_row(const kvc_driver *d, uint64_t dst, uint64_t src, uint64_t nbytes, int direction, CUstream stream) {
    if (direction == KVC_TO_HOST) return d->cuMemcpyDtoHAsync((void *)(uintptr_t)dst, src, nbytes, stream);
    if (direction == KVC_TO_DEVICE) return d->cuMemcpyHtoDAsync(dst, (const void *)(uintptr_t)src, nbytes, stream);
    return d->cuMemcpyDtoDAsync(dst, src, nbytes, stream);
}

static int copy_strip(const kvc_driver *d, int device, const kvc_strip *strip, int direction, CUstream stream,
                      kvc_issued *issued) {
    kvc_strip s = joined(strip);
    uint64_t most = d->max_pitch[device];
    /* A pitch over the device's limit (2 GB) is refused by the driver, so such rows go one by one. */
    if (s.rows == 1 || s.dst_pitch > most || s.src_pitch > most) {
        for (uint64_t r = 0; r < s.rows; r++) {
            int code = copy_row(d, s.dst + r * s.dst_pitch, s.src + r * s.src_pitch, s.row_bytes, direction, stream);
            if (code) return code;
            issued->calls++;
        }
        return 0;
    }
    CUDA_MEMCPY2D c;
    memset(&c, 0, sizeof c);
    c.WidthInBytes = (size_t)s.row_bytes;
    c.Height = (size_t)s.rows;
    c.srcPitch = (size_t)s.src_pitch;
    c.dstPitch = (size_t)s.dst_pitch;
    if (direction == KVC_TO_DEVICE) {
        c.srcMemoryType = CU_MEMORYTYPE_HOST;
        c.srcHost = (const void *)(uintptr_t)s.src;
    } else {
        c.srcMemoryType = CU_MEMORYTYPE_DEVICE;
        c.srcDevice = s.src;
    }
    if (direction == KVC_TO_HOST) {
        c.dstMemoryType = CU_MEMORYTYPE_HOST;
        c.dstHost = (void *)(uintptr_t)s.dst;
    } else {
        c.dstMemoryType = CU_MEMORYTYPE_DEVICE;
        c.dstDevice = s.dst;
    }
    int code = d->cuMemcpy2DAsync(&c, stream);
    if (!code) issued->calls++;
    return code;
}

typedef struct {
    CUdeviceptr dst[MOST_BATCH_ROWS];
    CUdeviceptr src[MOST_BATCH_ROWS];
    size_t sizes[MOST_BATCH_ROWS];
    size_t count;
} batch;

static int send(const kvc_driver *d, int device, batch *b, int direction, int flags, CUstream stream,
                kvc_issued *issued) {
    CUmemcpyAttributes how;
    size_t first = 0, failed = 0;
    const CUmemLocation there = {CU_MEM_LOCATION_TYPE_DEVICE, device}, here = {CU_MEM_LOCATION_TYPE_HOST, 0};
    if (!b->count) return 0;
    memset(&how, 0, sizeof how);
    /* The source is read in stream order, always when it is on the device: read early, it would be what was there before
     * the kernel that the stream waits for. Only host memory that is complete already may be read at any time. */
    how.srcAccessOrder = direction == KVC_TO_DEVICE && (flags & KVC_SOURCE_READY) ? CU_MEMCPY_SRC_ACCESS_ORDER_ANY
                                                                                 : CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    how.srcLocHint = direction == KVC_TO_DEVICE ? here : there;
    how.dstLocHint = direction == KVC_TO_HOST ? here : there;
    int code = d->batch_13000
                   ? d->batch_13000(b->dst, b->src, b->sizes, b->count, &how, &first, 1, stream)
                   : d->batch_12080(b->dst, b->src, b->sizes, b->count, &how, &first, 1, &failed, stream);
    if (!code) {
        issued->calls++;
        issued->batched += b->count;
        b->count = 0;
    }
    return code;
}

/* Returns 0 when all were sent. `*next` is the first strip of which rows may be missing: issued again as 2-D copies they
 * bring the same bytes to the same place, since nothing between them on the stream writes there. */
static int copy_batched(const kvc_driver *d, int device, const kvc_strip *strips, size_t count, int direction, int flags,
                        size_t most, CUstream stream, kvc_issued *issued, size_t *next) {
    batch b;
    b.count = 0;
    *next = 0;
    for (size_t i = 0; i < count; i++) {
        kvc_strip s = joined(&strips[i]);
        for (uint64_t r = 0; r < s.rows; r++) {
            if (b.count == most) {
                int code = send(d, device, &b, direction, flags, stream, issued);
                if (code) return code;
                *next = i;
            }
            b.dst[b.count] = s.dst + r * s.dst_pitch;
            b.src[b.count] = s.src + r * s.src_pitch;
            b.sizes[b.count] = (size_t)s.row_bytes;
            b.count++;
        }
    }
    int code = send(d, device, &b, direction, flags, stream, issued);
    if (!code) *next = count;
    return code;
}

static int can_batch(const kvc_driver *d, int device, int flags) {
    return (flags & KVC_BATCH) && (d->batch_13000 || d->batch_12080) && !kvc_load_int(&d->batch_refused[device]);
}

int kvc_copy(kvc_driver *driver, int device, const kvc_strip *strips, size_t count, int direction, int flags,
             size_t batch_rows, void *stream, kvc_issued *issued) {
    kvc_issued mine;
    if (!issued) issued = &mine;
    memset(issued, 0, sizeof *issued);
    issued->refused = UINT64_MAX;
    if (!driver || (count && !strips)) return KVC_BAD_ARGUMENT;
    if (direction < KVC_TO_HOST || direction > KVC_ON_DEVICE) return KVC_BAD_ARGUMENT;
    if ((uintptr_t)stream <= 1) return KVC_LEGACY_STREAM; /* NULL, and CU_STREAM_LEGACY */
    for (size_t i = 0; i < count; i++) {
        if (is_wrong(&strips[i])) {
            issued->refused = i;
            return KVC_BAD_ARGUMENT;
        }
    }
    int code = kvc_enter(driver, device);
    if (code) return code;
    size_t next = 0;
    if (count && can_batch(driver, device, flags)) {
        size_t most = batch_rows && batch_rows < MOST_BATCH_ROWS ? batch_rows : MOST_BATCH_ROWS;
        code = copy_batched(driver, device, strips, count, direction, flags, most, (CUstream)stream, issued, &next);
        if (code == CUDA_ERROR_INVALID_VALUE || code == CUDA_ERROR_NOT_SUPPORTED) {
            kvc_store_int(&driver->batch_refused[device], code);
            issued->batch_error = code;
            code = 0;
        }
        issued->strips = next;
    }
    while (!code && next < count) {
        code = copy_strip(driver, device, &strips[next], direction, (CUstream)stream, issued);
        if (!code) issued->strips = ++next;
    }
    if (code) issued->refused = next;
    return kvc_leave(driver, code);
}
