// A CUDA driver without a GPU, that does everything in the worst order streams allow.
//
// Host memory plays device memory. What is queued runs only later: at any call a stream may go on by some steps or not at
// all, as a seeded generator has it; some streams are eager and some lazy, which changes now and then. A copy runs row by
// row, other streams in between. So a wait that is missing shows as wrong bytes. What a real driver would refuse (no
// context, the legacy stream, a foreign handle) is refused, and what it would only do wrong (memory given back while a
// copy needs it) is noted, see mock_violations.
#include "kv_math.h"

#include "driver.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

struct Random {
    uint64_t state = 1;
    uint32_t next() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return uint32_t(state >> 33);
    }
    uint32_t below(uint32_t n) { return next() % n; }
};

struct State {
    uint64_t recorded = 0, happened = 0;
};

struct EventObject {
    int device;
    bool timing;
    std::shared_ptr<State> state = std::make_shared<State>();
};

struct Row {
    uint64_t dst, src, bytes;
    int early = -1;  // where its bytes are in `read`, when they were read before their turn
};

enum class Kind { copy, record, wait, segments, quants, compute, callback };

struct Op {
    Kind kind;
    std::vector<Row> rows;
    std::vector<std::vector<uint8_t>> read;
    std::shared_ptr<State> state;
    uint64_t number = 0;
    std::string function;
    uint32_t threads = 0;
    KvSegments segments;
    KvQuants quants;
    uint8_t key = 0;
    void (*call)() = nullptr;
};

struct StreamObject {
    int device;
    bool legacy;
    uint32_t eager = 0;  // of 4
    std::deque<std::unique_ptr<Op>> ops;
};

struct Context {
    int device;
    int retained = 0;
};

struct World {
    int version = 13000, devices = 1;
    Random random;
    std::vector<std::unique_ptr<Context>> contexts;
    std::vector<StreamObject *> streams;  // in order of creation, so that a seed means one order
    std::set<EventObject *> events;
    std::map<std::pair<uint64_t, int>, StreamObject *> defaults;
    std::map<uint64_t, uint64_t> allocated, registered;
    std::vector<uint64_t> freed_too_early;
    std::set<void *> modules;
    std::map<std::string, long> calls;
    std::map<std::string, std::pair<int, long>> failures;  // name: code, after so many calls
    int lost = 0;
    std::string violations;
    uint64_t most_batch = 4096, memory = 1ull << 30;
    int max_pitch = 2147483647;
};

std::recursive_mutex mutex;
bool still;    // nothing runs by itself
bool in_step;  // what runs in a callback queues, and runs nothing
World world;
thread_local std::vector<Context *> stack;

void violation(const std::string &what) { world.violations += what + "\n"; }

// ------------------------------------------------------------------------------------------ running

void move(const Row &row, const Op &op) {
    const void *from = row.early >= 0 ? (const void *)op.read[row.early].data() : (const void *)(uintptr_t)row.src;
    memmove((void *)(uintptr_t)row.dst, from, row.bytes);
}

template <bool GATHER> void run_segments(const Op &op) {
    for (uint64_t i = 0; i < op.segments.count; i++)
        for (uint32_t t = 0; t < op.threads; t++) kv_move<GATHER>(op.segments.items[i], t, op.threads);
}

void run_quants(const Op &op) {
    for (uint64_t i = 0; i < op.quants.count; i++) {
        const KvQuant &q = op.quants.items[i];
        if (op.function == "kv_quantise_columns") {
            for (uint64_t c = 0; c < kv_columns(q); c++) kv_column(q, c);
            continue;
        }
        for (uint64_t r = 0; r < (uint64_t)q.heads * q.tokens; r++) {
            uint32_t most = 0;
            if (q.group != KV_UNSCALED)
                for (uint32_t lane = 0; lane < 32; lane++) most = std::max(most, kv_row_magnitude(q, r, lane, 32));
            for (uint32_t lane = 0; lane < 32; lane++) kv_row_encode(q, r, most, lane, 32);
        }
    }
}

// One step of a stream; false when it has none to do, or waits.
bool step(StreamObject *stream) {
    if (in_step || stream->ops.empty()) return false;
    Op &op = *stream->ops.front();
    switch (op.kind) {
    case Kind::wait:
        if (op.state->happened < op.number) return false;
        break;
    case Kind::record: op.state->happened = std::max(op.state->happened, op.number); break;
    case Kind::segments: op.function == "kv_gather" ? run_segments<true>(op) : run_segments<false>(op); break;
    case Kind::quants: run_quants(op); break;
    case Kind::callback: {
        void (*call)() = op.call;
        in_step = true;
        call();
        in_step = false;
        break;
    }
    case Kind::copy:
    case Kind::compute: {
        // Rows in any order, some at a time.
        size_t count = 1 + world.random.below(uint32_t(op.rows.size()));
        while (count--) {
            size_t at = world.random.below(uint32_t(op.rows.size()));
            const Row row = op.rows[at];
            op.rows[at] = op.rows.back();
            op.rows.pop_back();
            move(row, op);
            if (op.kind == Kind::compute)
                for (uint64_t i = 0; i < row.bytes; i++) ((uint8_t *)(uintptr_t)row.dst)[i] ^= op.key;
        }
        if (!op.rows.empty()) return true;
        break;
    }
    }
    stream->ops.pop_front();
    return true;
}

void progress() {
    if (still || in_step || world.streams.empty()) return;
    if (!world.random.below(8)) world.streams[world.random.below(uint32_t(world.streams.size()))]->eager = world.random.below(5);
    size_t first = world.random.below(uint32_t(world.streams.size()));
    for (size_t i = 0; i < world.streams.size(); i++) {
        StreamObject *stream = world.streams[(first + i) % world.streams.size()];
        while (world.random.below(4) < stream->eager && step(stream)) {}
    }
}

// Runs until the state has happened so often; along what it needs, or anything.
int until(State *state, uint64_t number, StreamObject *drained = nullptr) {
    while (drained ? !drained->ops.empty() : state->happened < number) {
        size_t first = world.random.below(uint32_t(world.streams.size()));
        bool any = false;
        for (size_t i = 0; i < world.streams.size() && !any; i++)
            any = step(world.streams[(first + i) % world.streams.size()]);
        if (!any) {
            violation("a wait for something that never happens");
            return 702;
        }
    }
    return 0;
}

bool touches(const Op &op, uint64_t address, uint64_t bytes) {
    for (const Row &row : op.rows)
        for (uint64_t start : {row.dst, row.src})
            if (start < address + bytes && address < start + row.bytes) return true;
    return false;
}

bool in_use(uint64_t address, uint64_t bytes) {
    for (StreamObject *stream : world.streams)
        for (auto &op : stream->ops)
            if (touches(*op, address, bytes)) return true;
    return false;
}

// ------------------------------------------------------------------------------------------ calls

int began(const char *name, bool context = true) {
    world.calls[name]++;
    if (world.lost) return world.lost;
    auto failure = world.failures.find(name);
    if (failure != world.failures.end() && failure->second.second-- <= 0) {
        int code = failure->second.first;
        world.failures.erase(failure);
        return code;
    }
    if (context && stack.empty()) return 201;
    progress();
    return 0;
}

#define BEGIN(name)                                   \
    std::lock_guard<std::recursive_mutex> guard(mutex); \
    if (int code = began(name)) return code;
#define BEGIN_ANYWHERE(name)                          \
    std::lock_guard<std::recursive_mutex> guard(mutex); \
    if (int code = began(name, false)) return code;

StreamObject *new_stream(int device, bool legacy) {
    StreamObject *stream = new StreamObject{device, legacy, world.random.below(5), {}};
    world.streams.push_back(stream);
    return stream;
}

StreamObject *find_stream(CUstream handle) {
    uint64_t number = (uint64_t)(uintptr_t)handle;
    int device = stack.back()->device;
    if (number <= 2) {
        StreamObject *&stream = world.defaults[{number == 2 ? 2 : 0, device}];
        if (!stream) stream = new_stream(device, number < 2);
        return stream;
    }
    for (StreamObject *stream : world.streams)
        if ((CUstream)stream == handle) return stream->device == device ? stream : nullptr;
    return nullptr;
}

EventObject *find_event(CUevent handle) {
    EventObject *event = (EventObject *)handle;
    return world.events.count(event) ? event : nullptr;
}

void queue(StreamObject *stream, std::unique_ptr<Op> op) {
    stream->ops.push_back(std::move(op));
    progress();
}

int queue_rows(CUstream handle, std::vector<Row> rows) {
    StreamObject *stream = find_stream(handle);
    if (!stream) return 400;
    auto op = std::make_unique<Op>();
    op->kind = Kind::copy;
    op->rows = std::move(rows);
    queue(stream, std::move(op));
    return 0;
}

int batch(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *how, size_t *first,
          size_t numbers, CUstream handle) {
    BEGIN("cuMemcpyBatchAsync");
    StreamObject *stream = find_stream(handle);
    if (!stream || stream->legacy || !count || numbers != 1 || first[0] != 0) return 1;
    if (how->srcAccessOrder < 1 || how->srcAccessOrder > 3 || how->flags > 1) return 1;
    if (count > world.most_batch) violation("a batch of " + std::to_string(count) + " copies");
    auto op = std::make_unique<Op>();
    op->kind = Kind::copy;
    for (size_t i = 0; i < count; i++) {
        if (!sizes[i] || !dsts[i] || !srcs[i]) return 1;
        Row row{dsts[i], srcs[i], sizes[i], -1};
        if (how->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM && world.random.below(2)) {
            const uint8_t *from = (const uint8_t *)(uintptr_t)srcs[i];
            row.early = int(op->read.size());
            op->read.emplace_back(from, from + sizes[i]);
        }
        op->rows.push_back(row);
    }
    queue(stream, std::move(op));
    return 0;
}

int batch_13000(CUdeviceptr *d, CUdeviceptr *s, size_t *z, size_t n, CUmemcpyAttributes *a, size_t *i, size_t m, CUstream h) {
    return batch(d, s, z, n, a, i, m, h);
}

int batch_12080(CUdeviceptr *d, CUdeviceptr *s, size_t *z, size_t n, CUmemcpyAttributes *a, size_t *i, size_t m,
                size_t *failed, CUstream h) {
    *failed = SIZE_MAX;
    return batch(d, s, z, n, a, i, m, h);
}

// ------------------------------------------------------------------------------------------ the driver's functions

struct Name {
    int code;
    const char *name, *text;
};
const Name names[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

int get_error_name(CUresult code, const char **out) {
    for (const Name &n : names)
        if (n.code == code) return *out = n.name, 0;
    return *out = nullptr, 1;
}
int get_error_string(CUresult code, const char **out) {
    for (const Name &n : names)
        if (n.code == code) return *out = n.text, 0;
    return *out = nullptr, 1;
}
int device_get_count(int *n) { return *n = world.devices, 0; }
int device_get(CUdevice *out, int number) {
    if (number < 0 || number >= world.devices) return 101;
    return *out = number + 100, 0;  // not the number itself: handles are not numbers
}
int device_get_name(char *out, int size, CUdevice device) {
    return snprintf(out, size_t(size), "Mock GPU %d", device - 100), 0;
}
int device_get_attribute(int *out, int which, CUdevice) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: *out = world.max_pitch; return 0;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *out = 4; return 0;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: *out = 0; return 0;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *out = 2; return 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *out = 9; return 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *out = 0; return 0;
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: *out = 1; return 0;
    default: return 1;
    }
}
int device_total_mem(size_t *out, CUdevice) { return *out = size_t(world.memory), 0; }
int device_get_pci_bus_id(char *out, int size, CUdevice device) {
    return snprintf(out, size_t(size), "0000:%02X:00.0", device), 0;
}
int primary_retain(CUcontext *out, CUdevice device) {
    BEGIN_ANYWHERE("cuDevicePrimaryCtxRetain");
    Context *context = world.contexts[size_t(device - 100)].get();
    context->retained++;
    return *out = (CUcontext)context, 0;
}
int primary_release(CUdevice device) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    size_t number = size_t(device - 100);
    if (number >= world.contexts.size() || world.contexts[number]->retained <= 0) return 201;
    return world.contexts[number]->retained--, 0;
}
int push(CUcontext context) {
    BEGIN_ANYWHERE("cuCtxPushCurrent");
    return stack.push_back((Context *)context), 0;
}
int pop(CUcontext *out) {
    if (stack.empty()) return 201;
    *out = (CUcontext)stack.back();
    return stack.pop_back(), 0;
}
int memory_get_info(size_t *left, size_t *total) {
    BEGIN("cuMemGetInfo");
    uint64_t used = 0;
    for (auto &one : world.allocated) used += one.second;
    return *left = size_t(world.memory - used), *total = size_t(world.memory), 0;
}
int memory_alloc(CUdeviceptr *out, size_t bytes) {
    BEGIN("cuMemAlloc");
    void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return 2;
    memset(memory, 0xcd, bytes);  // whoever reads what nobody wrote shall see it
    *out = (CUdeviceptr)(uintptr_t)memory;
    return world.allocated[*out] = bytes, 0;
}
int memory_free(CUdeviceptr address) {
    BEGIN("cuMemFree");
    auto found = world.allocated.find(address);
    if (found == world.allocated.end()) return 1;
    if (in_use(address, found->second)) {
        violation("device memory freed while a copy needs it");
        world.freed_too_early.push_back(address);  // the copy comes all the same
    } else {
        free((void *)(uintptr_t)address);
    }
    return world.allocated.erase(found), 0;
}
int host_register(void *p, size_t bytes, unsigned) {
    BEGIN("cuMemHostRegister");
    uint64_t address = (uint64_t)(uintptr_t)p;
    for (auto &one : world.registered)
        if (one.first < address + bytes && address < one.first + one.second) return 712;
    return world.registered[address] = bytes, 0;
}
int host_unregister(void *p) {
    BEGIN("cuMemHostUnregister");
    auto found = world.registered.find((uint64_t)(uintptr_t)p);
    if (found == world.registered.end()) return 713;
    if (in_use(found->first, found->second)) violation("host memory unpinned while a copy needs it");
    return world.registered.erase(found), 0;
}
int copy_in(CUdeviceptr dst, const void *src, size_t bytes, CUstream stream) {
    BEGIN("cuMemcpyHtoDAsync");
    return queue_rows(stream, {{dst, (uint64_t)(uintptr_t)src, bytes}});
}
int copy_out(void *dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    BEGIN("cuMemcpyDtoHAsync");
    return queue_rows(stream, {{(uint64_t)(uintptr_t)dst, src, bytes}});
}
int copy_within(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    BEGIN("cuMemcpyDtoDAsync");
    return queue_rows(stream, {{dst, src, bytes}});
}
int copy_2d(const CUDA_MEMCPY2D *c, CUstream stream) {
    BEGIN("cuMemcpy2DAsync");
    if (c->srcMemoryType != 1 && c->srcMemoryType != 2) return 1;
    if (c->dstMemoryType != 1 && c->dstMemoryType != 2) return 1;
    if (c->srcArray || c->dstArray || c->srcXInBytes || c->srcY || c->dstXInBytes || c->dstY) return 1;
    if (c->srcPitch < c->WidthInBytes || c->dstPitch < c->WidthInBytes) return 1;
    if (c->srcPitch > size_t(world.max_pitch) || c->dstPitch > size_t(world.max_pitch)) return 1;
    uint64_t src = c->srcMemoryType == 1 ? (uint64_t)(uintptr_t)c->srcHost : c->srcDevice;
    uint64_t dst = c->dstMemoryType == 1 ? (uint64_t)(uintptr_t)c->dstHost : c->dstDevice;
    std::vector<Row> rows;
    for (size_t r = 0; r < c->Height; r++) rows.push_back({dst + r * c->dstPitch, src + r * c->srcPitch, c->WidthInBytes});
    return queue_rows(stream, std::move(rows));
}
int stream_create(CUstream *out, unsigned flags) {
    BEGIN("cuStreamCreate");
    if (flags > 1) return 1;
    return *out = (CUstream)new_stream(stack.back()->device, false), 0;
}
int stream_destroy(CUstream handle) {
    BEGIN("cuStreamDestroy");
    StreamObject *stream = find_stream(handle);
    if (!stream) return 400;
    if (int code = until(nullptr, 0, stream)) return code;  // what is queued runs all the same
    world.streams.erase(std::find(world.streams.begin(), world.streams.end(), stream));
    return delete stream, 0;
}
int stream_synchronize(CUstream handle) {
    BEGIN("cuStreamSynchronize");
    StreamObject *stream = find_stream(handle);
    return stream ? until(nullptr, 0, stream) : 400;
}
int stream_wait_event(CUstream handle, CUevent event_handle, unsigned flags) {
    BEGIN("cuStreamWaitEvent");
    StreamObject *stream = find_stream(handle);
    EventObject *event = find_event(event_handle);
    if (!stream || !event) return 400;
    if (flags) return 1;
    auto op = std::make_unique<Op>();
    op->kind = Kind::wait;
    op->state = event->state;
    op->number = event->state->recorded;  // the latest record now; of an event never recorded, nothing
    queue(stream, std::move(op));
    return 0;
}
int event_create(CUevent *out, unsigned flags) {
    BEGIN("cuEventCreate");
    if (flags > 3) return 1;
    EventObject *event = new EventObject{stack.back()->device, !(flags & 2)};
    world.events.insert(event);
    return *out = (CUevent)event, 0;
}
int event_destroy(CUevent handle) {
    BEGIN("cuEventDestroy");
    EventObject *event = find_event(handle);
    if (!event) return 400;
    world.events.erase(event);  // what waits for it holds its state
    return delete event, 0;
}
int event_record(CUevent event_handle, CUstream handle) {
    BEGIN("cuEventRecord");
    StreamObject *stream = find_stream(handle);
    EventObject *event = find_event(event_handle);
    if (!stream || !event || event->device != stream->device) return 400;
    auto op = std::make_unique<Op>();
    op->kind = Kind::record;
    op->state = event->state;
    op->number = ++event->state->recorded;
    queue(stream, std::move(op));
    return 0;
}
int event_query(CUevent handle) {
    BEGIN("cuEventQuery");
    EventObject *event = find_event(handle);
    if (!event) return 400;
    return event->state->happened >= event->state->recorded ? 0 : 600;
}
int event_synchronize(CUevent handle) {
    BEGIN("cuEventSynchronize");
    EventObject *event = find_event(handle);
    return event ? until(event->state.get(), event->state->recorded) : 400;
}
int event_elapsed(float *out, CUevent from, CUevent to) {
    BEGIN("cuEventElapsedTime");
    EventObject *a = find_event(from), *b = find_event(to);
    if (!a || !b || !a->timing || !b->timing) return 400;
    if (b->state->happened < b->state->recorded || !b->state->recorded) return 600;
    return *out = 2.0f, 0;
}
int module_load_data(CUmodule *out, const void *image) {
    BEGIN("cuModuleLoadData");
    const uint32_t magic = 0xBA55ED50;
    if (memcmp(image, &magic, 4) && memcmp(image, "MOCK", 4)) return 200;
    void *module = new char;
    world.modules.insert(module);
    return *out = (CUmodule)module, 0;
}
int module_unload(CUmodule module) {
    BEGIN("cuModuleUnload");
    if (!world.modules.erase(module)) return 400;
    return delete (char *)module, 0;
}
const char *kernels[] = {"kv_gather", "kv_scatter", "kv_quantise_rows", "kv_quantise_columns"};
int module_get_function(CUfunction *out, CUmodule module, const char *name) {
    BEGIN("cuModuleGetFunction");
    if (!world.modules.count(module)) return 400;
    for (const char *&kernel : kernels)
        if (!strcmp(kernel, name)) return *out = (CUfunction)&kernel, 0;
    return 500;
}
int launch(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
           CUstream handle, void **arguments, void **extra) {
    BEGIN("cuLaunchKernel");
    StreamObject *stream = find_stream(handle);
    if (!stream) return 400;
    if (!gx || gx > 2147483647u || !gy || gy > 65535 || gz != 1 || bx != 256 || by != 1 || bz != 1 || shared || extra) return 1;
    auto op = std::make_unique<Op>();
    op->function = *(const char **)function;
    op->kind = op->function == "kv_gather" || op->function == "kv_scatter" ? Kind::segments : Kind::quants;
    op->threads = gx * bx;
    if (op->kind == Kind::segments)
        memcpy(&op->segments, arguments[0], sizeof op->segments);
    else
        memcpy(&op->quants, arguments[0], sizeof op->quants);
    if (gy != (op->kind == Kind::segments ? op->segments.count : op->quants.count)) return 1;
    queue(stream, std::move(op));
    return 0;
}

struct Entry {
    const char *name;
    int since;
    void *address;
};
#define ENTRY(name, since, function) {name, since, (void *)(function)}
const Entry entries[] = {
    ENTRY("cuGetErrorName", 6000, get_error_name),
    ENTRY("cuGetErrorString", 6000, get_error_string),
    ENTRY("cuDeviceGetCount", 2000, device_get_count),
    ENTRY("cuDeviceGet", 2000, device_get),
    ENTRY("cuDeviceGetName", 2000, device_get_name),
    ENTRY("cuDeviceGetAttribute", 2000, device_get_attribute),
    ENTRY("cuDeviceTotalMem", 3020, device_total_mem),
    ENTRY("cuDeviceGetPCIBusId", 4010, device_get_pci_bus_id),
    ENTRY("cuDevicePrimaryCtxRetain", 7000, primary_retain),
    ENTRY("cuDevicePrimaryCtxRelease", 11000, primary_release),
    ENTRY("cuCtxPushCurrent", 4000, push),
    ENTRY("cuCtxPopCurrent", 4000, pop),
    ENTRY("cuMemGetInfo", 3020, memory_get_info),
    ENTRY("cuMemAlloc", 3020, memory_alloc),
    ENTRY("cuMemFree", 3020, memory_free),
    ENTRY("cuMemHostRegister", 6050, host_register),
    ENTRY("cuMemHostUnregister", 4000, host_unregister),
    ENTRY("cuMemcpyHtoDAsync", 3020, copy_in),
    ENTRY("cuMemcpyDtoHAsync", 3020, copy_out),
    ENTRY("cuMemcpyDtoDAsync", 3020, copy_within),
    ENTRY("cuMemcpy2DAsync", 3020, copy_2d),
    ENTRY("cuStreamCreate", 2000, stream_create),
    ENTRY("cuStreamDestroy", 4000, stream_destroy),
    ENTRY("cuStreamSynchronize", 2000, stream_synchronize),
    ENTRY("cuStreamWaitEvent", 3020, stream_wait_event),
    ENTRY("cuEventCreate", 2000, event_create),
    ENTRY("cuEventDestroy", 4000, event_destroy),
    ENTRY("cuEventRecord", 2000, event_record),
    ENTRY("cuEventQuery", 2000, event_query),
    ENTRY("cuEventSynchronize", 2000, event_synchronize),
    ENTRY("cuEventElapsedTime", 2000, event_elapsed),
    ENTRY("cuModuleLoadData", 2000, module_load_data),
    ENTRY("cuModuleUnload", 2000, module_unload),
    ENTRY("cuModuleGetFunction", 2000, module_get_function),
    ENTRY("cuLaunchKernel", 4000, launch),
    ENTRY("cuMemcpyBatchAsync", 12080, batch_12080),
    ENTRY("cuMemcpyBatchAsync", 13000, batch_13000),
};

}  // namespace

// ------------------------------------------------------------------------------------------ what is exported

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    return began("cuInit", false);
}
EXPORT int cuDriverGetVersion(int *out) { return *out = world.version, 0; }
EXPORT int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *found) {
    *out = nullptr;
    if (flags != 1) return *found = 1, 1;  // stream 0 would be another
    if (version > world.version) return *found = 2, 500;
    for (const Entry &entry : entries)
        if (!strcmp(entry.name, name) && entry.since <= version) *out = entry.address;  // the latest form it may have
    return *found = *out ? 0 : 1, *out ? 0 : 500;
}

EXPORT void mock_reset(int version, int devices, uint64_t seed) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    for (StreamObject *stream : world.streams) delete stream;
    for (EventObject *event : world.events) delete event;
    for (auto &one : world.allocated) free((void *)(uintptr_t)one.first);
    for (uint64_t address : world.freed_too_early) free((void *)(uintptr_t)address);
    for (void *module : world.modules) delete (char *)module;
    world = World();
    world.version = version;
    world.devices = devices;
    world.random.state = seed * 2654435761u + 12345;
    for (int i = 0; i < devices; i++) {
        world.contexts.push_back(std::make_unique<Context>());
        world.contexts.back()->device = i;
    }
    stack.clear();
}
EXPORT void mock_seed(uint64_t seed) { world.random.state = seed * 2654435761u + 12345; }
EXPORT void mock_fail(const char *name, int code, long after) { world.failures[name] = {code, after}; }
EXPORT void mock_still(int on) { still = on != 0; }
EXPORT void mock_lose(int code) { world.lost = code; }
EXPORT void mock_max_pitch(int bytes) { world.max_pitch = bytes; }
EXPORT long mock_calls(const char *name) { return world.calls[name]; }
EXPORT int mock_contexts(int device) { return world.contexts[size_t(device)]->retained; }
EXPORT int mock_depth() { return int(stack.size()); }
EXPORT long mock_alive() { return long(world.events.size() + world.allocated.size() + world.registered.size()); }
EXPORT size_t mock_violations(char *out, size_t size) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    snprintf(out, size, "%s", world.violations.c_str());
    return world.violations.size();
}
EXPORT long mock_pending() {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    long pending = 0;
    for (StreamObject *stream : world.streams) pending += long(stream->ops.size());
    return pending;
}
// Runs whatever can run; returns what is left.
EXPORT long mock_run() {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    for (bool any = true; any;) {
        any = false;
        for (StreamObject *stream : world.streams) any |= step(stream);
    }
    return mock_pending();
}
// Stands for a computation: dst[i] = src[i] ^ key, in pieces of `piece` bytes.
EXPORT int mock_compute(int device, void *handle, uint64_t dst, uint64_t src, uint64_t bytes, uint64_t piece, int key) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    stack.push_back(world.contexts[size_t(device)].get());
    StreamObject *stream = find_stream((CUstream)handle);
    stack.pop_back();
    if (!stream) return 400;
    auto op = std::make_unique<Op>();
    op->kind = Kind::compute;
    op->key = uint8_t(key);
    for (uint64_t at = 0; at < bytes; at += piece) op->rows.push_back({dst + at, src + at, std::min(piece, bytes - at)});
    queue(stream, std::move(op));
    return 0;
}
// A computation that the test has written. It must not wait for anything.
EXPORT int mock_call(int device, void *handle, void (*call)()) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    stack.push_back(world.contexts[size_t(device)].get());
    StreamObject *stream = find_stream((CUstream)handle);
    stack.pop_back();
    if (!stream) return 400;
    auto op = std::make_unique<Op>();
    op->kind = Kind::callback;
    op->call = call;
    queue(stream, std::move(op));
    return 0;
}
EXPORT uint64_t mock_registered() {
    uint64_t bytes = 0;
    for (auto &one : world.registered) bytes += one.second;
    return bytes;
}
