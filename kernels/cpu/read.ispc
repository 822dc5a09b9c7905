// Reads what an attention piece would read, in the same order, and does nothing else: the roof of the kernel.

#include "ahead.isph"

// One plane of one block; `bytes` is a multiple of 256.
static inline int read_plane(const uniform int8 *uniform plane, const uniform int8 *uniform ahead, uniform int bytes,
                             uniform bool whole) {
    int sum = 0;
    for (uniform int at = 0; at < bytes; at += 256) {
        const uniform int32 *uniform from = (const uniform int32 *uniform)(plane + at);
        if (whole) {
            const uniform int8 *uniform to = ahead + at;
            prefetch_l2(to);
            prefetch_l2(to + 64);
            prefetch_l2(to + 128);
            prefetch_l2(to + 192);
        }
        int part = 0;
#pragma unroll
        for (uniform int i = 0; i < 64 / programCount; i++) {
            const uniform int32 *uniform lanes = from + i * programCount;
            part ^= lanes[programIndex];
        }
        sum ^= part;
    }
    return sum;
}

export uniform int neo_read(const uniform NeoPiece *uniform piece, uniform int element_bytes) {
    int sum = 0;
    const uniform bool whole = piece->whole != 0;
    const uniform int bytes = piece->head_dim * piece->block_size * element_bytes;
    const uniform int64 block_bytes = piece->block_stride * element_bytes;
    const uniform int64 head_bytes = piece->head_stride * element_bytes;
    const uniform int8 *uniform k = (const uniform int8 *uniform)piece->k;
    const uniform int8 *uniform v = (const uniform int8 *uniform)piece->v;
    const uniform int per_segment = piece->segment / piece->block_size;
    const uniform int blocks = (piece->tokens + piece->block_size - 1) / piece->block_size;
    for (uniform int first = 0; first < blocks; first += per_segment) {
        const uniform int end = min(first + per_segment, blocks);
        const uniform int next = blocks_after(piece, first * piece->block_size);
        for (uniform int kv = 0; kv < piece->kv_heads; kv++) {
            const uniform bool more = kv + 1 < piece->kv_heads;
            const uniform bool full = next == per_segment;
            if (!more)
                fetch_starts(piece, piece->blocks + first + per_segment, next, element_bytes);
            const uniform int skip = !more && full ? per_segment : 0;
            const uniform int64 offset = kv * head_bytes;
            const uniform int64 ahead = (more ? kv + 1 : (full ? 0 : kv)) * head_bytes;
            for (uniform int b = first; b < end; b++)
                sum ^= read_plane(k + piece->blocks[b] * block_bytes + offset,
                                  k + piece->blocks[b + skip] * block_bytes + ahead, bytes, whole);
            for (uniform int b = first; b < end; b++)
                sum ^= read_plane(v + piece->blocks[b] * block_bytes + offset,
                                  v + piece->blocks[b + skip] * block_bytes + ahead, bytes, whole);
        }
    }
    uniform int all = 0;
    for (uniform int i = 0; i < programCount; i++) all ^= extract(sum, i);
    return all;
}
