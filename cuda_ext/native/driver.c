/* Finding the driver, its functions, and each device's primary context. */
#if !defined(_WIN32)
#define _GNU_SOURCE
#endif
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <windows.h>
typedef SRWLOCK lock_type;
static void lock_make(lock_type *lock) { InitializeSRWLock(lock); }
static void lock_drop(lock_type *lock) { (void)lock; }
static void lock_take(lock_type *lock) { AcquireSRWLockExclusive(lock); }
static void lock_give(lock_type *lock) { ReleaseSRWLockExclusive(lock); }
static void *library_open(const char *path) {
    /* The driver is in the system's folder; nothing beside the program may pass itself off as it. */
    return path ? (void *)LoadLibraryExA(path, NULL, 0)
                : (void *)LoadLibraryExA("nvcuda.dll", NULL, LOAD_LIBRARY_SEARCH_SYSTEM32);
}
static void *library_symbol(void *library, const char *name) { return (void *)GetProcAddress((HMODULE)library, name); }
static void library_close(void *library) { FreeLibrary((HMODULE)library); }
static void library_error(char *text, size_t size) { snprintf(text, size, "Windows error %lu", GetLastError()); }
#define SYSTEM_DRIVER "nvcuda.dll"
int kvc_load_int(const int *place) { return InterlockedCompareExchange((volatile LONG *)place, 0, 0); }
void kvc_store_int(int *place, int value) { InterlockedExchange((volatile LONG *)place, value); }
#else
#include <dlfcn.h>
#include <pthread.h>
typedef pthread_mutex_t lock_type;
static void lock_make(lock_type *lock) { pthread_mutex_init(lock, NULL); }
static void lock_drop(lock_type *lock) { pthread_mutex_destroy(lock); }
static void lock_take(lock_type *lock) { pthread_mutex_lock(lock); }
static void lock_give(lock_type *lock) { pthread_mutex_unlock(lock); }
#define SYSTEM_DRIVER "libcuda.so.1"
static void *library_open(const char *path) { return dlopen(path ? path : SYSTEM_DRIVER, RTLD_NOW | RTLD_LOCAL); }
static void *library_symbol(void *library, const char *name) { return dlsym(library, name); }
static void library_close(void *library) { dlclose(library); }
static void library_error(char *text, size_t size) {
    const char *error = dlerror();
    snprintf(text, size, "%s", error ? error : "unknown error of the loader");
}
int kvc_load_int(const int *place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
void kvc_store_int(int *place, int value) { __atomic_store_n(place, value, __ATOMIC_RELEASE); }
#endif

int kvc_abi(void) { return KVC_ABI; }

/* A function is no object, so its address is copied rather than cast. */
static void set_function(void *member, void *address) { memcpy(member, &address, sizeof address); }

typedef CUresult(CUDAAPI *PFN_get_address)(const char *, void **, int, uint64_t, int *);
typedef CUresult(CUDAAPI *PFN_init)(unsigned int);
typedef CUresult(CUDAAPI *PFN_version)(int *);

/* Stream 0 means what it means to torch: the legacy default stream. */
static int find_functions(kvc_driver *driver, PFN_get_address get, char *text, size_t size) {
    void *address;
    int found;
#define KVC_FETCH(name, version, arguments)                                          \
    address = NULL;                                                                  \
    if (get(#name, &address, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &found) != CUDA_SUCCESS || !address) {      \
        snprintf(text, size, "the driver has no function " #name);                   \
        return KVC_OLD_DRIVER;                                                       \
    }                                                                                \
    set_function(&driver->name, address);
    KVC_FUNCTIONS(KVC_FETCH)
#undef KVC_FETCH
    address = NULL;
    if (driver->version >= 13000) {
        if (get("cuMemcpyBatchAsync", &address, 13000, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &found) == CUDA_SUCCESS && address)
            set_function(&driver->batch_13000, address);
    } else if (driver->version >= 12080) {
        if (get("cuMemcpyBatchAsync", &address, 12080, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &found) == CUDA_SUCCESS && address)
            set_function(&driver->batch_12080, address);
    }
    return 0;
}

static int start(kvc_driver *driver, char *text, size_t size) {
    PFN_init init = NULL;
    PFN_version version = NULL;
    PFN_get_address get = NULL;
    set_function(&init, library_symbol(driver->library, "cuInit"));
    set_function(&version, library_symbol(driver->library, "cuDriverGetVersion"));
    set_function(&get, library_symbol(driver->library, "cuGetProcAddress_v2"));
    if (!init || !version) {
        snprintf(text, size, "the library has no function cuInit: it is no CUDA driver");
        return KVC_NO_DRIVER;
    }
    int code = version(&driver->version);
    if (code) {
        snprintf(text, size, "cuDriverGetVersion failed with error %d", code);
        return code;
    }
    if (!get || driver->version < 12000) {
        snprintf(text, size, "the driver is of CUDA %d.%d; 12.0 or later is needed", driver->version / 1000,
                 driver->version % 1000 / 10);
        return KVC_OLD_DRIVER;
    }
    code = find_functions(driver, get, text, size);
    if (code) return code;
    code = init(0);
    if (!code) code = driver->cuDeviceGetCount(&driver->devices);
    if (code) {
        char name[64], why[256];
        kvc_error_text(driver, code, name, sizeof name, why, sizeof why);
        snprintf(text, size, "%s: %s", name, why);
        return code;
    }
    if (driver->devices > KVC_MAX_DEVICES) driver->devices = KVC_MAX_DEVICES;
    return 0;
}

int kvc_open(const char *path, kvc_driver **out, char *text, size_t size) {
    if (!out || !text || !size) return KVC_BAD_ARGUMENT;
    *out = NULL;
    text[0] = 0;
    kvc_driver *driver = calloc(1, sizeof *driver);
    lock_type *lock = calloc(1, sizeof *lock);
    if (!driver || !lock) {
        free(driver);
        free(lock);
        snprintf(text, size, "out of host memory");
        return KVC_NO_MEMORY;
    }
    driver->library = library_open(path);
    if (!driver->library) {
        library_error(text, size);
        free(driver);
        free(lock);
        return KVC_NO_DRIVER;
    }
    int code = start(driver, text, size);
    if (code) {
        library_close(driver->library);
        free(driver);
        free(lock);
        return code;
    }
    lock_make(lock);
    driver->lock = lock;
    *out = driver;
    return 0;
}

void kvc_close(kvc_driver *driver) {
    if (!driver) return;
    for (int i = 0; i < driver->devices; i++) {
        CUdevice device;
        if (driver->contexts[i] && !driver->cuDeviceGet(&device, i)) driver->cuDevicePrimaryCtxRelease(device);
    }
    lock_drop(driver->lock);
    free(driver->lock);
    library_close(driver->library);
    free(driver);
}

static const struct {
    int code;
    const char *name, *text;
} own_errors[] = {
    {KVC_NO_DRIVER, "KVC_NO_DRIVER", "no CUDA driver (" SYSTEM_DRIVER ") on this machine"},
    {KVC_OLD_DRIVER, "KVC_OLD_DRIVER", "the CUDA driver is older than 12.0"},
    {KVC_BAD_ARGUMENT, "KVC_BAD_ARGUMENT", "an argument that cannot be right; nothing was issued"},
    {KVC_LEGACY_STREAM, "KVC_LEGACY_STREAM",
     "copies and kernels need a stream of their own: the legacy default stream waits for all others"},
    {KVC_NO_MEMORY, "KVC_NO_MEMORY", "out of host memory"},
    {KVC_NO_SUCH_DEVICE, "KVC_NO_SUCH_DEVICE", "no CUDA device of this number"},
};

void kvc_error_text(const kvc_driver *driver, int code, char *name, size_t name_size, char *text, size_t text_size) {
    const char *found = NULL, *why = NULL;
    for (size_t i = 0; i < sizeof own_errors / sizeof *own_errors; i++)
        if (own_errors[i].code == code) found = own_errors[i].name, why = own_errors[i].text;
    if (!found && driver && driver->cuGetErrorName) {
        if (driver->cuGetErrorName(code, &found)) found = NULL;
        if (driver->cuGetErrorString(code, &why)) why = NULL;
    }
    if (found)
        snprintf(name, name_size, "%s", found);
    else
        snprintf(name, name_size, "CUDA error %d", code);
    snprintf(text, text_size, "%s", why ? why : "the driver has no text for it");
}

int kvc_version(const kvc_driver *driver) { return driver->version; }

int kvc_batch_form(const kvc_driver *driver) { return driver->batch_13000 ? 8 : driver->batch_12080 ? 9 : 0; }

int kvc_batch_refused(const kvc_driver *driver, int device) {
    if (device < 0 || device >= driver->devices) return 0;
    return kvc_load_int(&driver->batch_refused[device]);
}

int kvc_device_count(const kvc_driver *driver) { return driver->devices; }

/* Retained once and kept: releasing the last reference would destroy the context, with all of torch's memory. Its flags
 * are left as they are, and it is never reset. */
static int context_of(kvc_driver *driver, int number, CUcontext *out) {
    CUcontext context = NULL;
    CUdevice device;
    int code = 0, pitch = 0;
    lock_take(driver->lock);
    if (!driver->contexts[number]) {
        code = driver->cuDeviceGet(&device, number);
        if (!code) code = driver->cuDeviceGetAttribute(&pitch, CU_DEVICE_ATTRIBUTE_MAX_PITCH, device);
        if (!code) code = driver->cuDevicePrimaryCtxRetain(&context, device);
        if (!code) {
            driver->max_pitch[number] = (uint64_t)pitch;
            driver->contexts[number] = context;
        }
    }
    *out = driver->contexts[number];
    lock_give(driver->lock);
    return code;
}

int kvc_enter(kvc_driver *driver, int device) {
    CUcontext context;
    if (!driver) return KVC_BAD_ARGUMENT;
    if (device < 0 || device >= driver->devices) return KVC_NO_SUCH_DEVICE;
    int code = context_of(driver, device, &context);
    return code ? code : driver->cuCtxPushCurrent(context);
}

int kvc_leave(kvc_driver *driver, int code) {
    CUcontext mine;
    int popped = driver->cuCtxPopCurrent(&mine);
    return code ? code : popped;
}
