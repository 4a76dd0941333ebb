// Compiling this compares what driver.h says of the driver with what CUDA's own headers say.
#include <array>
#include <cstddef>
#include <cstdint>

namespace ours {
#include "driver.h"
constexpr int portable = CU_MEMHOSTREGISTER_PORTABLE;  // a macro from here on
}  // namespace ours
#include <cuda.h>
#include <cudaTypedefs.h>

#define SAME(what) static_assert((long)ours::what == (long)::what, #what)
SAME(CUDA_SUCCESS);
SAME(CUDA_ERROR_INVALID_VALUE);
SAME(CUDA_ERROR_NOT_READY);
SAME(CUDA_ERROR_NOT_SUPPORTED);
SAME(CU_GET_PROC_ADDRESS_LEGACY_STREAM);
SAME(CU_MEMORYTYPE_HOST);
SAME(CU_MEMORYTYPE_DEVICE);
SAME(CU_MEM_LOCATION_TYPE_DEVICE);
SAME(CU_STREAM_NON_BLOCKING);
SAME(CU_EVENT_BLOCKING_SYNC);
SAME(CU_EVENT_DISABLE_TIMING);
static_assert(ours::portable == CU_MEMHOSTREGISTER_PORTABLE, "CU_MEMHOSTREGISTER_PORTABLE");
SAME(CU_DEVICE_ATTRIBUTE_MAX_PITCH);
SAME(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(CU_DEVICE_ATTRIBUTE_INTEGRATED);
SAME(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
SAME(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED);

#define FIELD(type, name) \
    static_assert(offsetof(ours::type, name) == offsetof(::type, name) && \
                  sizeof(ours::type::name) == sizeof(::type::name), #type "." #name)
#define WHOLE(type) static_assert(sizeof(ours::type) == sizeof(::type) && alignof(ours::type) == alignof(::type), #type)
WHOLE(CUDA_MEMCPY2D);
FIELD(CUDA_MEMCPY2D, srcXInBytes);
FIELD(CUDA_MEMCPY2D, srcY);
FIELD(CUDA_MEMCPY2D, srcMemoryType);
FIELD(CUDA_MEMCPY2D, srcHost);
FIELD(CUDA_MEMCPY2D, srcDevice);
FIELD(CUDA_MEMCPY2D, srcArray);
FIELD(CUDA_MEMCPY2D, srcPitch);
FIELD(CUDA_MEMCPY2D, dstXInBytes);
FIELD(CUDA_MEMCPY2D, dstY);
FIELD(CUDA_MEMCPY2D, dstMemoryType);
FIELD(CUDA_MEMCPY2D, dstHost);
FIELD(CUDA_MEMCPY2D, dstDevice);
FIELD(CUDA_MEMCPY2D, dstArray);
FIELD(CUDA_MEMCPY2D, dstPitch);
FIELD(CUDA_MEMCPY2D, WidthInBytes);
FIELD(CUDA_MEMCPY2D, Height);
WHOLE(CUdeviceptr);
WHOLE(CUdevice);

// The result and the arguments of a function, by their sizes.
template <class F> struct Call;
template <class R, class... A> struct Call<R(CUDAAPI *)(A...)> {
    static constexpr std::array<size_t, sizeof...(A) + 1> sizes{sizeof(R), sizeof(A)...};
};
template <class F, class G> constexpr bool alike() {
    if (Call<F>::sizes.size() != Call<G>::sizes.size()) return false;
    for (size_t i = 0; i < Call<F>::sizes.size(); i++)
        if (Call<F>::sizes[i] != Call<G>::sizes[i]) return false;
    return true;
}
#define FUNCTION(name, version, arguments) static_assert(alike<ours::PFN_##name, PFN_##name##_v##version>(), #name);
KVC_FUNCTIONS(FUNCTION)

#if CUDA_VERSION >= 12080
SAME(CU_MEM_LOCATION_TYPE_HOST);
SAME(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
SAME(CU_MEMCPY_SRC_ACCESS_ORDER_ANY);
WHOLE(CUmemLocation);
WHOLE(CUmemcpyAttributes);
FIELD(CUmemcpyAttributes, srcAccessOrder);
FIELD(CUmemcpyAttributes, srcLocHint);
FIELD(CUmemcpyAttributes, dstLocHint);
FIELD(CUmemcpyAttributes, flags);
static_assert(alike<ours::PFN_batch_12080, PFN_cuMemcpyBatchAsync_v12080>(), "nine arguments");
#endif
#if CUDA_VERSION >= 13000
static_assert(alike<ours::PFN_batch_13000, PFN_cuMemcpyBatchAsync_v13000>(), "eight arguments");
#endif
int main() { return 0; }
