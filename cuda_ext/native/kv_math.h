/* What the kernels compute: which byte goes where, and how a number is rounded.
 *
 * The same code is compiled for the device (kernels.cu) and for the host (the tests, under sanitizers, against PyTorch).
 * A kernel only says which piece of the work its thread has. Indices are 64 bits wide. Floats follow IEEE without
 * shortcuts, so that host and device give the same bits: no fast division, no flush to zero, no fused multiply-add.
 */
#ifndef KV_MATH_H
#define KV_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define KV_BOTH __host__ __device__ __forceinline__
#else
#define KV_BOTH inline
#endif

/* Tables travel in the kernel's arguments, of which a launch takes 4 KB on every architecture. So there is no table in
 * memory that has to live until the kernel has run. */
#define KV_MOST_SEGMENTS 64
#define KV_MOST_QUANTS 60 /* keys and values of 30 layers */

/* `rows` rows of `row_bytes` bytes. Row r lies at strided + (index ? index[r] : r) * pitch on one side, and at
 * packed + r * row_bytes on the other; index is the address of int64 numbers that the device can read, or 0. */
struct KvSegment {
    uint64_t strided;
    uint64_t packed;
    uint64_t pitch;
    uint64_t row_bytes;
    uint64_t rows;
    uint64_t index;
};

struct KvSegments {
    uint64_t count;
    KvSegment items[KV_MOST_SEGMENTS];
};

enum KvType { KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2 };
enum KvCode { KV_INT8 = 0, KV_FP8_E4M3 = 1 };
enum KvGroup { KV_BY_TOKEN = 0, KV_BY_CHANNEL = 1, KV_UNSCALED = 2 };

/* One tensor [heads, tokens, width], width contiguous. Codes go to out, [heads, tokens, width] without gaps; float32
 * scales to scales: [heads, tokens] by token, [heads, ceil(tokens / span), width] by channel, where up to span tokens
 * share a scale. */
struct KvQuant {
    uint64_t src;
    uint64_t out;
    uint64_t scales;
    uint64_t head_pitch;
    uint64_t token_pitch;
    uint32_t heads;
    uint32_t tokens;
    uint32_t width;
    uint32_t span;
    uint8_t type;
    uint8_t code;
    uint8_t group;
    uint8_t reserved[5];
};

struct KvQuants {
    uint64_t count;
    KvQuant items[KV_MOST_QUANTS];
};

static_assert(sizeof(KvSegment) == 48 && sizeof(KvQuant) == 64, "the Python side has the same layout");
static_assert(sizeof(KvSegments) <= 4000 && sizeof(KvQuants) <= 4000, "a launch takes 4 KB of arguments");

/* ---------------------------------------------------------------------------------- which byte goes where */

struct alignas(16) KvWord16 {
    uint64_t low, high;
};

/* The widest word that every address of the segment is a multiple of. */
KV_BOTH unsigned kv_word_bytes(const KvSegment &s) {
    const uint64_t all = s.strided | s.packed | s.row_bytes | s.pitch;
    if (!(all & 15)) return 16;
    if (!(all & 7)) return 8;
    if (!(all & 3)) return 4;
    if (!(all & 1)) return 2;
    return 1;
}

template <bool GATHER, typename WORD>
KV_BOTH void kv_move_words(const KvSegment &s, uint64_t first, uint64_t step) {
    const uint64_t words = s.row_bytes / sizeof(WORD), total = words * s.rows;
    const int64_t *index = (const int64_t *)(uintptr_t)s.index;
    for (uint64_t i = first; i < total; i += step) {
        /* A division of 64 bits is slow on a GPU, and needed only beyond four billion words. */
        const uint64_t row = total >> 32 ? i / words : (uint32_t)i / (uint32_t)words;
        const uint64_t column = i - row * words;
        const uint64_t place = s.index ? (uint64_t)index[row] : row;
        WORD *strided = (WORD *)(uintptr_t)(s.strided + place * s.pitch) + column;
        WORD *packed = (WORD *)(uintptr_t)s.packed + i;
        if (GATHER)
            *packed = *strided;
        else
            *strided = *packed;
    }
}

/* What thread `first` of `step` threads moves of a segment. */
template <bool GATHER>
KV_BOTH void kv_move(const KvSegment &s, uint64_t first, uint64_t step) {
    switch (kv_word_bytes(s)) {
    case 16: return kv_move_words<GATHER, KvWord16>(s, first, step);
    case 8: return kv_move_words<GATHER, uint64_t>(s, first, step);
    case 4: return kv_move_words<GATHER, uint32_t>(s, first, step);
    case 2: return kv_move_words<GATHER, uint16_t>(s, first, step);
    default: return kv_move_words<GATHER, uint8_t>(s, first, step);
    }
}

/* ---------------------------------------------------------------------------------- how a number is rounded */

KV_BOTH uint32_t kv_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

KV_BOTH float kv_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

KV_BOTH float kv_from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31) return kv_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return kv_float(sign | kv_bits((float)mantissa * 5.9604644775390625e-8f)); /* 2^-24 */
    return kv_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

KV_BOTH float kv_load(uint64_t row, uint64_t i, int type) {
    if (type == KV_F32) return ((const float *)(uintptr_t)row)[i];
    const uint16_t half = ((const uint16_t *)(uintptr_t)row)[i];
    return type == KV_F16 ? kv_from_half(half) : kv_float((uint32_t)half << 16);
}

/* Magnitudes as bits: their order is that of the numbers, infinity comes after all, and not-a-number after that. So
 * the greatest is the same in whatever order threads look, and what is not finite is never lost. */
KV_BOTH uint32_t kv_magnitude(float x) { return kv_bits(x) & 0x7fffffffu; }

#define KV_NOT_FINITE 0x7f800000u

KV_BOTH float kv_nan() { return kv_float(0x7fc00000u); }

/* 0 for a group of zeros (or of numbers so small that their scale is none), not-a-number for one that has a value
 * which is not finite: its codes are 0, and no reader can take it for a good one. */
KV_BOTH float kv_scale(uint32_t magnitude, int code) {
    if (magnitude >= KV_NOT_FINITE) return kv_nan();
    return kv_float(magnitude) / (code == KV_INT8 ? 127.0f : 448.0f);
}

/* Nearest, ties to even; at most 127 either way, so that -128 never occurs. */
KV_BOTH uint8_t kv_int8(float x) {
    const float rounded = rintf(x);
    const float held = rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded;
    return (uint8_t)(int8_t)(int32_t)held;
}

/* e4m3 without infinities: nearest, ties to even, finite values held at 448; what is not finite becomes not-a-number. */
KV_BOTH uint8_t kv_fp8_e4m3(float x) {
    const uint32_t sign = kv_bits(x) >> 24 & 0x80u, bits = kv_magnitude(x);
    if (bits >= KV_NOT_FINITE) return (uint8_t)(sign | 0x7fu);
    if (bits >= 0x43e00000u) return (uint8_t)(sign | 0x7eu);                          /* 448 and more */
    if (bits < 0x3c800000u) return (uint8_t)(sign | (uint32_t)rintf(kv_float(bits) * 512.0f)); /* below 2^-6 */
    const uint32_t rounded = bits + 0x7ffffu + (bits >> 20 & 1u); /* 20 bits of the mantissa go */
    return (uint8_t)(sign | ((rounded >> 20) - (120u << 3)));
}

KV_BOTH uint8_t kv_encode(float x, float scale, int code, bool scaled) {
    if (scaled) {
        if (scale != scale) return 0; /* not finite: there is nothing to say */
        x = scale > 0.0f ? x / scale : kv_float(kv_bits(x) & 0x80000000u); /* a zero keeps its sign */
    }
    return code == KV_INT8 ? kv_int8(x) : kv_fp8_e4m3(x);
}

/* -- by token: the lanes of a warp share a row ------------------------------------------------------------- */

KV_BOTH uint64_t kv_row(const KvQuant &q, uint64_t row) {
    return q.src + row / q.tokens * q.head_pitch + row % q.tokens * q.token_pitch;
}

KV_BOTH uint32_t kv_row_magnitude(const KvQuant &q, uint64_t row, uint32_t lane, uint32_t lanes) {
    const uint64_t address = kv_row(q, row);
    uint32_t most = 0;
    for (uint32_t i = lane; i < q.width; i += lanes) {
        const uint32_t magnitude = kv_magnitude(kv_load(address, i, q.type));
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

KV_BOTH void kv_row_encode(const KvQuant &q, uint64_t row, uint32_t magnitude, uint32_t lane, uint32_t lanes) {
    const uint64_t address = kv_row(q, row);
    const bool scaled = q.group != KV_UNSCALED;
    const float scale = scaled ? kv_scale(magnitude, q.code) : 1.0f;
    uint8_t *out = (uint8_t *)(uintptr_t)q.out + row * q.width;
    for (uint32_t i = lane; i < q.width; i += lanes)
        out[i] = kv_encode(kv_load(address, i, q.type), scale, q.code, scaled);
    if (scaled && lane == 0) ((float *)(uintptr_t)q.scales)[row] = scale;
}

/* -- by channel: a thread has a column: span tokens of one channel of a head -------------------------------- */

KV_BOTH uint64_t kv_columns(const KvQuant &q) { return (uint64_t)q.heads * ((q.tokens - 1) / q.span + 1) * q.width; }

KV_BOTH void kv_column(const KvQuant &q, uint64_t column) {
    const uint64_t groups = (q.tokens - 1) / q.span + 1;
    const uint64_t channel = column % q.width, group = column / q.width % groups, head = column / q.width / groups;
    const uint64_t from = q.src + head * q.head_pitch, first = group * q.span;
    const uint64_t end = first + q.span < q.tokens ? first + q.span : q.tokens;
    uint8_t *out = (uint8_t *)(uintptr_t)q.out + head * q.tokens * q.width + channel;
    uint32_t most = 0;
    for (uint64_t t = first; t < end; t++) {
        const uint32_t magnitude = kv_magnitude(kv_load(from + t * q.token_pitch, channel, q.type));
        most = magnitude > most ? magnitude : most;
    }
    const float scale = kv_scale(most, q.code);
    for (uint64_t t = first; t < end; t++)
        out[t * q.width] = kv_encode(kv_load(from + t * q.token_pitch, channel, q.type), scale, q.code, true);
    ((float *)(uintptr_t)q.scales)[column] = scale;
}

#endif
