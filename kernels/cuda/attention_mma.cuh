// Decode attention on tensor cores. Every warp is a worker of its own: no barrier, no other warp to wait for.
//
// With T tokens of a tile as m and the query heads of a KV head as n, both products take the cache as their left side:
//     S^T [tokens][heads] = K [tokens][d] Q^T [d][heads]        O^T [d][heads] += V^T [d][tokens] P^T [tokens][heads]
// K and V come through ldmatrix.trans from planes as they lie in the cache. A thread holds the same two heads in S^T
// and in O^T (columns 2 * (lane % 4) and the next), so maxima and sums stay where they are used; P^T, as a right side,
// is S^T's registers transposed by movmatrix. With up to 8 heads per KV head nothing of n is padding that costs time:
// the kernel waits for memory, not for the tensor cores.
//
// Two cursors walk the same run of tiles: one asks for tiles (cp.async, `stages` of them in a ring), one computes.
#pragma once

#include <ptx.cuh>

#include "attention.h"

namespace neo {

constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ int tiles_of(int length) { return (length + TILE - 1) / TILE; }

// A place in a worker's run.
struct Cursor {
    int row, unit, tile, length, tiles; // tiles: of this row
};

__device__ __forceinline__ Cursor begin(const Attention &args, const Start &start) {
    const int length = args.lengths[start.row];
    return Cursor{start.row, start.unit, start.tile, length, tiles_of(length)};
}

// To the next tile, which is there.
__device__ __forceinline__ void advance(const Attention &args, Cursor &at) {
    if (++at.tile < at.tiles)
        return;
    at.tile = 0;
    if (++at.unit < args.units)
        return;
    at.unit = 0;
    do {
        at.length = args.lengths[++at.row];
    } while (at.length <= 0);
    at.tiles = tiles_of(at.length);
}

// Brings tiles into shared memory.
template <class T, int D> struct Loader {
    static constexpr int ROUNDS = D / 16;               // of 32 lanes times 16 bytes, for K and for V each
    static constexpr int V_ROW = 2 * D + 16;            // bytes
    static constexpr int V_PLANE = 2 * TILE * D;        // where V begins, bytes
    static constexpr int CHUNKS = D / 8;                // of 16 bytes in a row of V

    const Attention &args;
    Cursor at;
    const int32_t *table;
    int entry = 0;       // this lane's of 32 table entries
    int first = 0;       // index of the first of them; -1: none
    const int lane;

    __device__ Loader(const Attention &a, const Start &start, int lane_) : args(a), at(begin(a, start)), lane(lane_) {
        find_table();
    }

    __device__ void find_table() {
        const int64_t slot = args.slots == nullptr ? at.row : args.slots[at.row];
        table = args.tables + slot * args.table_stride;
        first = -1;
    }

    __device__ int block_of(int token) {
        const int index = token >> args.block_shift;
        if (first < 0 || index < first || index >= first + 32) { // the same for all lanes
            first = index;
            const int last = (at.length - 1) >> args.block_shift;
            entry = table[min(index + lane, last)];
        }
        return __shfl_sync(ALL, entry, index - first);
    }

    // Block and offset of the 8 tokens from `token` on, in elements of the cache.
    __device__ int64_t block_start(int token) {
        const int last = at.length - 1;
        return block_of(token <= last ? token : last) * args.block_stride;
    }

    __device__ void load(uint32_t to) {
        const T *head = static_cast<const T *>(args.cache) + (at.unit / args.cuts) * args.head_stride;
        const int token = at.tile * TILE;
        const int mask = (1 << args.block_shift) - 1;
        const int64_t start0 = block_start(token);
        const int64_t start1 = args.block_shift == 3 ? block_start(token + 8) : start0;
        const int offset0 = token & mask, offset1 = (token + 8) & mask;

        const bool second = (lane & 1) != 0; // lanes take the two token halves of a row of K in turn
        const T *k = head + (second ? start1 + offset1 : start0 + offset0) + ((lane >> 1) << args.block_shift);
        uint32_t k_to = to + ((second ? D : 0) + (lane >> 1)) * 16;
        const int64_t k_step = int64_t{16} << args.block_shift;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            copy_16(k_to + i * 256, k + i * k_step, true);

        const int valid = at.length - token; // rows of V behind the end may be NaN, which a weight of 0 does not remove
        const T *v = head + (D << args.block_shift);
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int chunk = i * 32 + lane;
            const int t = chunk / CHUNKS, j = chunk % CHUNKS;
            const int64_t row = t < 8 ? start0 + (offset0 + t) * D : start1 + (offset1 + t - 8) * D;
            copy_16(to + V_PLANE + t * V_ROW + j * 16, v + row + j * 8, t < valid);
        }
    }

    __device__ void next() {
        const int row = at.row;
        advance(args, at);
        if (at.row != row)
            find_table();
    }
};

// Running softmax of one unit: N times 8 query heads.
template <class T, int D, int N> struct Sums {
    uint32_t q[N][D / 16][2];
    float o[N][D / 16][4]; // rows (d) lane / 4 and + 8, columns (heads) 2 * (lane % 4) and + 1
    float max[N][2], sum[N][2];

    __device__ void begin(const Attention &args, const Cursor &at, int lane) {
        const int in_group = (at.unit % args.cuts) * HEADS_OF_MMA * N;
        const T *row = static_cast<const T *>(args.q) + at.row * args.q_stride +
                       (at.unit / args.cuts * args.group + in_group) * args.q_head_stride;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int head = n * HEADS_OF_MMA + lane / 4;
            const bool there = in_group + head < args.group;
            const T *d = row + (there ? head : 0) * args.q_head_stride + (lane % 4) * 2;
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                q[n][k][0] = there ? *reinterpret_cast<const uint32_t *>(d + k * 16) : 0u;
                q[n][k][1] = there ? *reinterpret_cast<const uint32_t *>(d + k * 16 + 8) : 0u;
                o[n][k][0] = o[n][k][1] = o[n][k][2] = o[n][k][3] = 0.f;
            }
            max[n][0] = max[n][1] = -INFINITY;
            sum[n][0] = sum[n][1] = 0.f;
        }
    }

    __device__ void take(uint32_t tile, int valid, float scale_log2, int lane) {
        const int i = lane / 8, r = lane % 8;
        const uint32_t k_at = tile + ((i & 1) * D + (i >> 1) * 8 + r) * 16;
        const uint32_t v_at = tile + Loader<T, D>::V_PLANE + ((i >> 1) * 8 + r) * Loader<T, D>::V_ROW + (i & 1) * 16;
        float s[2][N][4] = {}; // two chains of sums, for half the waiting
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[4];
            load_transposed(a, k_at + k * 256);
#pragma unroll
            for (int n = 0; n < N; n++)
                mma(s[k % 2][n], a, q[n][k], T{});
        }
        uint32_t p[N][2];
#pragma unroll
        for (int n = 0; n < N; n++) {
            float x[4];
#pragma unroll
            for (int c = 0; c < 4; c++)
                x[c] = lane / 4 + (c < 2 ? 0 : 8) < valid ? (s[0][n][c] + s[1][n][c]) * scale_log2 : -INFINITY;
            float alpha[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float m = fmaxf(x[h], x[h + 2]);
                m = fmaxf(m, __shfl_xor_sync(ALL, m, 4));
                m = fmaxf(m, __shfl_xor_sync(ALL, m, 8));
                m = fmaxf(m, __shfl_xor_sync(ALL, m, 16));
                m = fmaxf(m, max[n][h]);
                alpha[h] = exp2f(max[n][h] - m);
                max[n][h] = m;
                x[h] = exp2f(x[h] - m);
                x[h + 2] = exp2f(x[h + 2] - m);
                sum[n][h] = sum[n][h] * alpha[h] + x[h] + x[h + 2];
            }
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                o[n][k][0] *= alpha[0];
                o[n][k][1] *= alpha[1];
                o[n][k][2] *= alpha[0];
                o[n][k][3] *= alpha[1];
            }
            p[n][0] = transpose(pack(x[0], x[1], T{}));
            p[n][1] = transpose(pack(x[2], x[3], T{}));
        }
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[4];
            load_transposed(a, v_at + k * 32);
#pragma unroll
            for (int n = 0; n < N; n++)
                mma(o[n][k], a, p[n], T{});
        }
    }

    // Sums over all tokens, which lanes of the same columns share.
    __device__ void end() {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                for (int step = 4; step < 32; step *= 2)
                    sum[n][h] += __shfl_xor_sync(ALL, sum[n][h], step);
    }

    // Calls put(head of the unit, d, value) for every element, divided by the sum of weights if `whole`.
    template <class Put> __device__ void each(int lane, bool whole, Put put) const {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int head = n * HEADS_OF_MMA + 2 * (lane % 4) + h;
                const float by = whole ? 1.f / sum[n][h] : 1.f;
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    put(head, k * 16 + lane / 4, o[n][k][h] * by);
                    put(head, k * 16 + lane / 4 + 8, o[n][k][h + 2] * by);
                }
            }
    }
};

// Writes what a worker found of a unit; where others have parts of it, who comes last merges them.
template <class T, int D, int N> struct Finish {
    static constexpr int HEADS = HEADS_OF_MMA * N;
    const Attention &args;
    const int worker, lane;

    __device__ T *out_of(const Cursor &at, int head) const {
        return static_cast<T *>(args.out) + at.row * args.out_stride +
               (at.unit / args.cuts * args.group + (at.unit % args.cuts) * HEADS + head) * args.out_head_stride;
    }
    __device__ int heads_of(const Cursor &at) const { return min(HEADS, args.group - (at.unit % args.cuts) * HEADS); }

    __device__ void whole(const Cursor &at, const Sums<T, D, N> &sums) const {
        const int heads = heads_of(at);
        sums.each(lane, true, [&](int head, int d, float value) {
            if (head < heads)
                out_of(at, head)[d] = from_float<T>(value);
        });
    }

    // A worker has two places: for a part that begins where its run begins, and for its last one.
    __device__ void part(const Cursor &at, const Sums<T, D, N> &sums, int position, bool at_start) const {
        const int heads = heads_of(at);
        const int64_t place = 2 * worker + (at_start ? 0 : 1);
        float *to = args.plan.sum_v + place * HEADS * D;
        sums.each(lane, false, [&](int head, int d, float value) {
            if (head < heads)
                to[head * D + d] = value;
        });
        if (lane < 4)
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int h = 0; h < 2; h++)
                    args.plan.max_and_sum[place * HEADS + n * HEADS_OF_MMA + 2 * lane + h] =
                        make_float2(sums.max[n][h], sums.sum[n][h]);
        const int begin = position - at.tile; // of this unit, in the line of all tiles
        const int run = args.plan.run[0];
        const int first = begin / run, last = (begin + at.tiles - 1) / run;
        int32_t *counter = args.plan.arrived + at.row * args.units + at.unit;
        __threadfence();
        __syncwarp();
        int before = 0;
        if (lane == 0)
            before = atomicAdd(counter, 1);
        before = __shfl_sync(ALL, before, 0);
        if (before != last - first)
            return;
        __threadfence();
        if (lane == 0)
            *counter = 0;
        for (int head = 0; head < heads; head++)
            merge(out_of(at, head), head, first, last, begin == first * run);
    }

    // Parts of workers first .. last. The first one's lies in its second place unless its run begins with the unit.
    __device__ void merge(T *out, int head, int first, int last, bool from_start) const {
        const auto place = [&](int w) -> int64_t { return 2 * w + (w == first && !from_start ? 1 : 0); };
        const auto stats = [&](int w) { return __ldcg(&args.plan.max_and_sum[place(w) * HEADS + head]); };
        float max = -INFINITY;
        for (int w = first + lane; w <= last; w += 32)
            max = fmaxf(max, stats(w).x);
        max = warp_max(max);
        float sum = 0.f;
        for (int w = first + lane; w <= last; w += 32)
            sum += stats(w).y * exp2f(stats(w).x - max);
        const float by = 1.f / warp_sum(sum);
        constexpr int PER_LANE = (D + 31) / 32;
        float o[PER_LANE] = {};
#pragma unroll 4
        for (int w = first; w <= last; w++) {
            const float weight = exp2f(stats(w).x - max);
            const float *from = args.plan.sum_v + (place(w) * HEADS + head) * D;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                if (D % 32 == 0 || i * 32 + lane < D)
                    o[i] += weight * __ldcg(from + i * 32 + lane);
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (D % 32 == 0 || i * 32 + lane < D)
                out[i * 32 + lane] = from_float<T>(o[i] * by);
    }
};

// Rows without tokens are in nobody's run.
template <class T, int D> __device__ void clear_empty(const Attention &args, int worker, int lane) {
    for (int row = worker; row < args.rows; row += args.workers)
        if (args.lengths[row] <= 0)
            for (int i = lane; i < args.q_heads * D; i += 32)
                static_cast<T *>(args.out)[row * args.out_stride + i / D * args.out_head_stride + i % D] =
                    from_float<T>(0.f);
}

template <class T, int D, int N>
__global__ void __launch_bounds__(WARPS_OF_CTA * 32) attend(const __grid_constant__ Attention args) {
    NEO_DYNAMIC_SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int worker = blockIdx.x * WARPS_OF_CTA + warp;
    clear_empty<T, D>(args, worker, lane);
    const Start start = args.plan.starts[worker];
    if (start.count <= 0)
        return;
    constexpr int BYTES = TILE_BYTES<D>;
    const int stages = args.stages;
    const uint32_t ring = shared_address(shared) + warp * stages * BYTES;
    const uint32_t ring_end = ring + stages * BYTES;

    Loader<T, D> loader(args, start, lane);
    int to_load = start.count;
    uint32_t load_at = ring;
    const auto load = [&] {
        if (to_load > 0) {
            loader.load(load_at);
            if (--to_load > 0)
                loader.next();
        }
        end_group(); // empty ones too: groups are counted
        load_at += BYTES;
        if (load_at == ring_end)
            load_at = ring;
    };
    for (int i = 1; i < stages; i++)
        load();

    const int position = worker * args.plan.run[0]; // of the run, in the line of all tiles
    const Finish<T, D, N> finish{args, worker, lane};
    Sums<T, D, N> sums;
    Cursor at = begin(args, start);
    int part_begin = 0; // of this unit, in the run
    bool whole = at.tile == 0;
    uint32_t take_at = ring;
    sums.begin(args, at, lane);
    for (int i = 0; i < start.count; i++) {
        load();
        await_groups(stages - 1);
        __syncwarp();
        sums.take(take_at, at.length - at.tile * TILE, args.scale_log2, lane);
        __syncwarp(); // all have read before any asks for the next tile there
        take_at += BYTES;
        if (take_at == ring_end)
            take_at = ring;
        const bool last = at.tile + 1 == at.tiles;
        const bool over = i + 1 == start.count;
        if (last || over) {
            sums.end();
            if (whole && last)
                finish.whole(at, sums);
            else
                finish.part(at, sums, position + i, part_begin == 0);
            if (over)
                break;
            part_begin = i + 1;
            whole = true;
        }
        advance(args, at);
        if (last)
            sums.begin(args, at, lane);
    }
}

template <class T, int D, int N>
cudaError_t launch_one(const Attention &args, int ctas, cudaStream_t stream) noexcept {
    const int bytes = WARPS_OF_CTA * args.stages * tile_bytes(D);
    const cudaError_t error =
        cudaFuncSetAttribute(attend<T, D, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess)
        return error;
    launch_kernel(attend<T, D, N>, ctas, WARPS_OF_CTA * 32, bytes, stream, args);
    return cudaGetLastError();
}

template <class T> cudaError_t launch_mma(const Attention &args, int n, int ctas, cudaStream_t stream) noexcept {
    const bool wide = n == 2;
    switch (args.head_dim) {
    case 64: return wide ? launch_one<T, 64, 2>(args, ctas, stream) : launch_one<T, 64, 1>(args, ctas, stream);
    case 80: return launch_one<T, 80, 1>(args, ctas, stream);
    case 96: return launch_one<T, 96, 1>(args, ctas, stream);
    case 128: return wide ? launch_one<T, 128, 2>(args, ctas, stream) : launch_one<T, 128, 1>(args, ctas, stream);
    case 256: return launch_one<T, 256, 1>(args, ctas, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace neo
