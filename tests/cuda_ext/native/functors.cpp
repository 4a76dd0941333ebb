// Runs the kernels' code on the host, for the tests: cases come in on stdin, results go out on stdout. Every buffer is
// exactly as large as it must be, so that a sanitizer sees any byte read or written beside it.
#include "kv_math.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

static void get(void *to, size_t bytes) {
    if (bytes && fread(to, 1, bytes, stdin) != bytes) exit(3);
}

static uint64_t number() {
    uint64_t n = 0;
    get(&n, 8);
    return n;
}

// A buffer whose first byte is `shift` beyond a multiple of 16.
struct Buffer {
    char *all, *bytes;
    size_t size;
    Buffer(size_t n, size_t shift) : all((char *)malloc(n + shift)), bytes(all + shift), size(n) {}
    ~Buffer() { free(all); }
    uint64_t address() const { return (uint64_t)(uintptr_t)bytes; }
};

static void move(bool gather) {
    KvSegment s{};
    s.pitch = number(), s.row_bytes = number(), s.rows = number();
    const uint64_t strided_bytes = number(), strided_shift = number(), packed_shift = number(), threads = number();
    std::vector<int64_t> index(number());
    get(index.data(), index.size() * 8);
    Buffer strided(strided_bytes, strided_shift), packed(s.rows * s.row_bytes, packed_shift);
    get(strided.bytes, strided.size);
    get(packed.bytes, packed.size);
    s.strided = strided.address(), s.packed = packed.address();
    s.index = index.empty() ? 0 : (uint64_t)(uintptr_t)index.data();
    for (uint64_t t = 0; t < threads; t++) gather ? kv_move<true>(s, t, threads) : kv_move<false>(s, t, threads);
    const Buffer &result = gather ? packed : strided;
    fwrite(result.bytes, 1, result.size, stdout);
}

static void quantise() {
    KvQuant q{};
    q.type = uint8_t(number()), q.code = uint8_t(number()), q.group = uint8_t(number());
    q.heads = uint32_t(number()), q.tokens = uint32_t(number()), q.width = uint32_t(number()), q.span = uint32_t(number());
    q.head_pitch = number(), q.token_pitch = number();
    const uint64_t bytes = number();
    Buffer source(bytes, 0), out((size_t)q.heads * q.tokens * q.width, 0);
    Buffer scales(q.group == KV_UNSCALED ? 0 : 4 * (q.group == KV_BY_TOKEN ? (size_t)q.heads * q.tokens : kv_columns(q)), 0);
    get(source.bytes, bytes);
    q.src = source.address(), q.out = out.address(), q.scales = scales.address();
    if (q.group == KV_BY_CHANNEL) {
        for (uint64_t c = 0; c < kv_columns(q); c++) kv_column(q, c);
    } else {
        for (uint64_t r = 0; r < (uint64_t)q.heads * q.tokens; r++) {
            uint32_t most = 0;
            for (uint32_t lane = 0; lane < 32 && q.group != KV_UNSCALED; lane++) {
                const uint32_t magnitude = kv_row_magnitude(q, r, lane, 32);
                most = magnitude > most ? magnitude : most;
            }
            for (uint32_t lane = 0; lane < 32; lane++) kv_row_encode(q, r, most, lane, 32);
        }
    }
    fwrite(out.bytes, 1, out.size, stdout);
    fwrite(scales.bytes, 1, scales.size, stdout);
}

int main() {
    for (uint64_t cases = number(); cases; cases--) {
        const uint64_t what = number();
        if (what == 2)
            quantise();
        else
            move(what == 0);
    }
    return 0;
}
