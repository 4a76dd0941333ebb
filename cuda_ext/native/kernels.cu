/* The kernels: who does which piece. What is done is in kv_math.h. blockIdx.y is the item of the table. */
#include "kv_math.h"

#define KV_THREAD (blockIdx.x * (uint64_t)blockDim.x + threadIdx.x)
#define KV_THREADS (gridDim.x * (uint64_t)blockDim.x)

extern "C" __global__ void kv_gather(const __grid_constant__ KvSegments table) {
    if (blockIdx.y < table.count) kv_move<true>(table.items[blockIdx.y], KV_THREAD, KV_THREADS);
}

extern "C" __global__ void kv_scatter(const __grid_constant__ KvSegments table) {
    if (blockIdx.y < table.count) kv_move<false>(table.items[blockIdx.y], KV_THREAD, KV_THREADS);
}

/* A warp has a row; blocks are whole warps. */
extern "C" __global__ void kv_quantise_rows(const __grid_constant__ KvQuants table) {
    if (blockIdx.y >= table.count) return;
    const KvQuant &q = table.items[blockIdx.y];
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t rows = (uint64_t)q.heads * q.tokens;
    for (uint64_t row = KV_THREAD / 32; row < rows; row += KV_THREADS / 32) {
        uint32_t most = 0;
        if (q.group != KV_UNSCALED) {
            most = kv_row_magnitude(q, row, lane, 32);
            for (int offset = 16; offset; offset /= 2) {
                const uint32_t other = __shfl_xor_sync(0xffffffffu, most, offset);
                most = other > most ? other : most;
            }
        }
        kv_row_encode(q, row, most, lane, 32);
    }
}

extern "C" __global__ void kv_quantise_columns(const __grid_constant__ KvQuants table) {
    if (blockIdx.y >= table.count) return;
    const KvQuant &q = table.items[blockIdx.y];
    const uint64_t columns = kv_columns(q);
    for (uint64_t column = KV_THREAD; column < columns; column += KV_THREADS) kv_column(q, column);
}
