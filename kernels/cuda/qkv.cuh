// What both kernels of rotary embedding and append take, and where a row goes in the cache.
#pragma once

#include "scale.cuh"

namespace neo {

constexpr int ROPE_WARPS = 8; // of a block that takes heads of one row

template <class T> struct Qkv {
    T *cache;
    const T *qkv, *bias, *q_norm, *k_norm, *cos, *sin;
    T *q_out, *k_out, *v_out;
    int64_t qkv_stride, q_stride, kv_stride, table_stride;
    const int32_t *tables, *slots, *positions;
    int32_t rows, q_heads, kv_heads, head_dim, block, early;
    float eps;
    Scale<T, ROPE_WARPS * 32> scale;
};

// Where a row goes in the cache: its block there (-1: nowhere) and the place in it.
struct Target {
    int64_t number;
    int offset;
};

template <class T> __device__ __forceinline__ Target target_of(const Qkv<T> &args, int row) {
    const int64_t slot = args.tables == nullptr || row >= args.rows ? -1 : args.slots[row];
    if (slot < 0)
        return Target{-1, 0};
    const int position = args.positions[row];
    return Target{args.tables[slot * args.table_stride + position / args.block], position % args.block};
}

template <class T> __device__ __forceinline__ T *plane_of(const Qkv<T> &args, const Target &target, int kv_head) {
    return args.cache + (target.number * args.kv_heads + kv_head) * 2 * args.head_dim * args.block;
}

} // namespace neo
