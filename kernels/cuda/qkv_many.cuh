// Rotary embedding and append of many rows (chunks of prompts), in 16 bits. A block has 16 rows and some heads of each. A
// thread has 8 neighbours in either half of a row's heads, one head after the other, with the row's cosines and sines at
// hand; all its heads are asked for before any is used: the kernel waits for memory, and needs much of it on its way.
//
// Keys, whose tokens lie side by side in the cache, are turned in shared memory: 16 lanes then write the 16 rows of one
// dimension. Where rows follow each other in the cache, wherever a chunk begins in its block, that is one or two sectors of
// 32 bytes, not 16.
#pragma once

#include "qkv.cuh"

namespace neo {

constexpr int MANY_ROWS = 512;    // from here on
constexpr int MANY_THREADS = 256;
constexpr int MANY_CTAS = 3;      // that a multiprocessor should have registers for
constexpr int TILE_ROWS = 16;     // of a block
constexpr int HEADS_OF_THREAD = 4;
constexpr int MOST_ROWS = 65535 * TILE_ROWS; // of a grid
// Beside each row of keys in shared memory, elements that make it an odd number of words: rows are in different banks.
constexpr int KEY_PADDING = 2;

// Heads that a block has at once, and in all, if so many lanes share a row's head.
template <int LANES> constexpr int HEADS_AT_ONCE = MANY_THREADS / (TILE_ROWS * LANES);
template <int LANES> constexpr int HEADS_OF_BLOCK = HEADS_OF_THREAD * HEADS_AT_ONCE<LANES>;

constexpr int PAIRS = 4; // 16 bytes

__device__ __forceinline__ float2 sum(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 product(float2 a, float by, float2 b) { return make_float2(a.x * (by * b.x), a.y * (by * b.y)); }
__device__ __forceinline__ float2 turned(float2 a, float2 b, float2 cos, float2 sin) {
    return make_float2(a.x * cos.x + b.x * sin.x, a.y * cos.y + b.y * sin.y);
}

// Of a head of one row: elements d to d + 7, and those half a head behind. Pairs of elements, as they came: taken apart they
// would need twice the registers.
struct Slice {
    uint32_t low[PAIRS], high[PAIRS];

    __device__ __forceinline__ void load(const void *from, int half_bytes) {
        const auto *const at = static_cast<const char *>(from);
        const uint4 first = *reinterpret_cast<const uint4 *>(at), second = *reinterpret_cast<const uint4 *>(at + half_bytes);
        low[0] = first.x, low[1] = first.y, low[2] = first.z, low[3] = first.w;
        high[0] = second.x, high[1] = second.y, high[2] = second.z, high[3] = second.w;
    }
    __device__ __forceinline__ void store(void *to, int half_bytes) const {
        auto *const at = static_cast<char *>(to);
        *reinterpret_cast<uint4 *>(at) = uint4{low[0], low[1], low[2], low[3]};
        *reinterpret_cast<uint4 *>(at + half_bytes) = uint4{high[0], high[1], high[2], high[3]};
    }
    __device__ __forceinline__ void store_pairs(void *to, int half_bytes) const { // aligned to a pair alone
        auto *const at = static_cast<char *>(to);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            reinterpret_cast<uint32_t *>(at)[i] = low[i];
            reinterpret_cast<uint32_t *>(at + half_bytes)[i] = high[i];
        }
    }
};

// Bias, norm and, unless it is a head of v, rotation in fp32; rounded once. All lanes of a warp call it; LANES of them
// share a head. `there`: whether this one has a slice. bias and norm: NULL or at the slice's first element.
template <class T, int HALF, int LANES>
__device__ __forceinline__ void turn(Slice &x, bool there, const T *bias, const T *norm, bool is_v, Slice &cos,
                                     Slice &sin, float eps) {
    constexpr int BYTES = HALF * static_cast<int>(sizeof(T));
    float2 low[PAIRS], high[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        low[i] = unpack(x.low[i], T{});
        high[i] = unpack(x.high[i], T{});
    }
    if (bias != nullptr && there) {
        Slice of;
        of.load(bias, BYTES);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            low[i] = sum(low[i], unpack(of.low[i], T{}));
            high[i] = sum(high[i], unpack(of.high[i], T{}));
        }
    }
    if (norm != nullptr) { // the same for all of a warp
        float square = 0.f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            square += low[i].x * low[i].x + low[i].y * low[i].y + high[i].x * high[i].x + high[i].y * high[i].y;
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) // nothing is 0 where there is no slice
            square += __shfl_xor_sync(0xffffffffu, square, step);
        const float by = rsqrtf(square / static_cast<float>(2 * HALF) + eps);
        Slice of{};
        if (there)
            of.load(norm, BYTES);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            low[i] = product(low[i], by, unpack(of.low[i], T{}));
            high[i] = product(high[i], by, unpack(of.high[i], T{}));
        }
    }
    if (!is_v) {
        stay_packed(cos.low);
        stay_packed(cos.high);
        stay_packed(sin.low);
        stay_packed(sin.high);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float2 a = low[i], b = high[i];
            low[i] = turned(a, b, unpack(cos.low[i], T{}), unpack(sin.low[i], T{}));
            high[i] = turned(b, a, unpack(cos.high[i], T{}), unpack(sin.high[i], T{}));
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        x.low[i] = pack(low[i].x, low[i].y, T{});
        x.high[i] = pack(high[i].x, high[i].y, T{});
    }
}

// Keys [head][row][d] of heads first_head and on to their planes: neighbouring lanes have neighbouring rows.
template <class T, int D>
__device__ __forceinline__ void append_keys(const Qkv<T> &args, const T *keys, const Target *targets, int first, int heads) {
    const int r = threadIdx.x % TILE_ROWS;
    const Target target = targets[r];
    if (target.number < 0)
        return;
    for (int h = 0; h < heads; h++) {
        const int kv_head = first + h - args.q_heads;
        if (kv_head < 0 || kv_head >= args.kv_heads)
            continue;
        const T *const from = keys + (h * TILE_ROWS + r) * (D + KEY_PADDING);
        T *const to = plane_of(args, target, kv_head) + target.offset;
#pragma unroll
        for (int i = 0; i < D; i += MANY_THREADS / TILE_ROWS) { // D is a multiple of that
            const int d = i + static_cast<int>(threadIdx.x) / TILE_ROWS;
            to[d * args.block] = from[d];
        }
    }
}

// LANES: that share a row's head, a power of two; some have nothing to do where a head is not as many slices.
template <class T, int D, int LANES>
__global__ void __launch_bounds__(MANY_THREADS, MANY_CTAS) rope_append_many(const __grid_constant__ Qkv<T> args) {
    NEO_DYNAMIC_SHARED(shared);
    __shared__ Target targets[TILE_ROWS];
    constexpr int HEADS = HEADS_OF_BLOCK<LANES>, TOGETHER = HEADS_AT_ONCE<LANES>;
    constexpr int HALF = D / 2, BYTES = HALF * static_cast<int>(sizeof(T));
    const int q_heads = args.q_heads, v_first = q_heads + args.kv_heads;
    const int d = static_cast<int>(threadIdx.x) % LANES * Vec<T>::N, r = threadIdx.x / LANES % TILE_ROWS;
    const int first = blockIdx.x * HEADS, mine = first + static_cast<int>(threadIdx.x) / (LANES * TILE_ROWS);
    const int heads = min(HEADS, v_first + args.kv_heads - first);
    const int64_t row = int64_t{blockIdx.y} * TILE_ROWS + r;
    const bool there = row < args.rows && d < HALF;
    T *const keys = reinterpret_cast<T *>(shared);

    release_next();
    if (args.early == 0)
        await_previous();
    Slice of[HEADS_OF_THREAD] = {}, cos{}, sin{};
    if (there) {
        cos.load(args.cos + row * D + d, BYTES);
        sin.load(args.sin + row * D + d, BYTES);
    }
    await_previous();
    const T *const from = args.qkv + row * args.qkv_stride + d;
#pragma unroll
    for (int i = 0; i < HEADS_OF_THREAD; i++)
        if (there && i * TOGETHER + mine < first + heads)
            of[i].load(from + (i * TOGETHER + mine) * D, BYTES);
    const bool appends = first + heads > q_heads; // the same for all of the block
    if (appends) { // one lookup behind the other: not ahead of the loads
        if (threadIdx.x < TILE_ROWS)
            targets[threadIdx.x] = target_of(args, static_cast<int>(blockIdx.y * TILE_ROWS + threadIdx.x));
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < HEADS_OF_THREAD; i++) {
        const int head = i * TOGETHER + mine; // the same for all of a warp
        if (head >= first + heads)
            continue;
        const bool is_q = head < q_heads, is_v = head >= v_first;
        const T *const norm = is_v ? nullptr : is_q ? args.q_norm : args.k_norm;
        turn<T, HALF, LANES>(of[i], there, args.bias == nullptr ? nullptr : args.bias + head * D + d,
                       norm == nullptr ? nullptr : norm + d, is_v, cos, sin, args.eps);
        if (!there)
            continue;
        T *const out = is_q ? args.q_out : is_v ? args.v_out : args.k_out;
        const int kv_head = head - (is_v ? v_first : q_heads);
        if (out != nullptr)
            of[i].store(out + (is_q ? row * args.q_stride + head * D : row * args.kv_stride + kv_head * D) + d, BYTES);
        if (is_q)
            continue;
        if (!is_v)
            of[i].store_pairs(keys + ((head - first) * TILE_ROWS + r) * (D + KEY_PADDING) + d, BYTES);
        else if (targets[r].number >= 0)
            of[i].store(plane_of(args, targets[r], kv_head) + (args.block + targets[r].offset) * D + d, BYTES);
    }
    if (appends && first < v_first) {
        __syncthreads();
        append_keys<T, D>(args, keys, targets, first, heads);
    }
}

template <class T, int D> void launch_dim(const Qkv<T> &args, cudaStream_t stream) {
    constexpr int SLICES = D / 2 / Vec<T>::N, LANES = SLICES <= 4 ? 4 : SLICES <= 8 ? 8 : 16;
    const int heads = args.q_heads + 2 * args.kv_heads, of_block = HEADS_OF_BLOCK<LANES>;
    const dim3 grid((heads + of_block - 1) / of_block, (args.rows + TILE_ROWS - 1) / TILE_ROWS);
    const size_t keys = sizeof(T) * of_block * TILE_ROWS * (D + KEY_PADDING); // up to 33 KiB
    launch_overlapping(rope_append_many<T, D, LANES>, grid, MANY_THREADS, keys, stream, args);
}

template <class T> void launch_many(const Qkv<T> &args, cudaStream_t stream) {
    switch (args.head_dim) {
    case 64: return launch_dim<T, 64>(args, stream);
    case 80: return launch_dim<T, 80>(args, stream);
    case 96: return launch_dim<T, 96>(args, stream);
    case 128: return launch_dim<T, 128>(args, stream);
    default: return launch_dim<T, 256>(args, stream);
    }
}

} // namespace neo
