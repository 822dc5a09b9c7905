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

// A tile in a worker's run.
struct Cursor {
    int row, unit, tile, length, tiles; // tiles: of this row
    int begin;                          // the unit's first place in the line

    __device__ int place() const { return begin + UNIT_COST + tile; }
    __device__ int next_place() const { return place() + 1 + (tile + 1 == tiles ? UNIT_COST : 0); }
};

__device__ __forceinline__ Cursor begin(const Attention &args, const Start &start, int place) {
    const int length = args.lengths[start.row];
    return Cursor{start.row, start.unit,       max(start.offset - UNIT_COST, 0),
                  length,    tiles_of(length), place - start.offset};
}

// To the next tile, which is there.
__device__ __forceinline__ void advance(const Attention &args, Cursor &at) {
    if (++at.tile < at.tiles)
        return;
    at.tile = 0;
    at.begin += UNIT_COST + at.tiles;
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

    __device__ Loader(const Attention &a, const Cursor &start, int lane_) : args(a), at(start), lane(lane_) {
        find_table();
    }

    static __device__ int k_word(int d, int half) { return 2 * d + (half ^ (d >> 2 & 1)); }

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

        // Row d of K has two words of 16 bytes, tokens 0-7 and 8-15; they change places in every other four rows. So the
        // 8 rows of a matrix lie in 8 different words of 128 bytes, and so do 128 bytes of the cache in all block sizes.
        const bool second = (lane & 1) != 0;
        const T *k = head + (second ? start1 + offset1 : start0 + offset0) + ((lane >> 1) << args.block_shift);
        const uint32_t k_to = to + k_word(lane >> 1, lane & 1) * 16;
        const int64_t k_step = int64_t{16} << args.block_shift;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            copy_16(k_to + i * 512, k + i * k_step, true);

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
        const uint32_t k_at = tile + Loader<T, D>::k_word((i >> 1) * 8 + r, i & 1) * 16;
        const uint32_t v_at = tile + Loader<T, D>::V_PLANE + ((i >> 1) * 8 + r) * Loader<T, D>::V_ROW + (i & 1) * 16;
        float s[2][N][4] = {}; // two chains of sums, for half the waiting
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[4];
            load_transposed(a, k_at + k * 512);
#pragma unroll
            for (int n = 0; n < N; n++)
                mma(s[k % 2][n], a, q[n][k], T{});
        }
        float x[N][4], m[N][2];
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++)
                x[n][c] = lane / 4 + (c < 2 ? 0 : 8) < valid ? (s[0][n][c] + s[1][n][c]) * scale_log2 : -INFINITY;
            m[n][0] = fmaxf(x[n][0], x[n][2]);
            m[n][1] = fmaxf(x[n][1], x[n][3]);
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) // outside, for 2 N shuffles at once
#pragma unroll
            for (int j = 0; j < 2 * N; j++)
                m[j / 2][j % 2] = fmaxf(m[j / 2][j % 2], __shfl_xor_sync(ALL, m[j / 2][j % 2], step));
        uint32_t p[N][2];
#pragma unroll
        for (int n = 0; n < N; n++) {
            float alpha[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float most = fmaxf(m[n][h], max[n][h]);
                alpha[h] = exp2f(max[n][h] - most);
                max[n][h] = most;
                x[n][h] = exp2f(x[n][h] - most);
                x[n][h + 2] = exp2f(x[n][h + 2] - most);
                sum[n][h] = sum[n][h] * alpha[h] + x[n][h] + x[n][h + 2];
            }
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                o[n][k][0] *= alpha[0];
                o[n][k][1] *= alpha[1];
                o[n][k][2] *= alpha[0];
                o[n][k][3] *= alpha[1];
            }
            p[n][0] = transpose(pack(x[n][0], x[n][1], T{}));
            p[n][1] = transpose(pack(x[n][2], x[n][3], T{}));
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

    // A worker keeps two parts: one that begins where its run begins, and its last one.
    __device__ void part(const Cursor &at, const Sums<T, D, N> &sums, bool at_start) const {
        const int heads = heads_of(at);
        const int64_t mine = 2 * worker + (at_start ? 0 : 1);
        float *to = args.plan.sum_v + mine * HEADS * D;
        sums.each(lane, false, [&](int head, int d, float value) {
            if (head < heads)
                to[head * D + d] = value;
        });
        if (lane < 4)
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int h = 0; h < 2; h++)
                    args.plan.max_and_sum[mine * HEADS + n * HEADS_OF_MMA + 2 * lane + h] =
                        make_float2(sums.max[n][h], sums.sum[n][h]);
        const int run = args.plan.run[0], begin = at.begin + UNIT_COST;
        Parts parts{begin / run, (begin + at.tiles - 1) / run, 1, 0};
        parts.first_is_second = parts.first * run < at.begin ? 1 : 0;
        int others = parts.last - parts.first;
        if (others >= GROUP) {
            const int lead = parts.first + (worker - parts.first) / GROUP * GROUP;
            const Parts group{lead, min(lead + GROUP - 1, parts.last), 1, lead == parts.first ? parts.first_is_second : 0};
            if (!is_last(args.plan.grouped + group.place(lead), group.last - lead))
                return;
            merge(at, group, false);
            parts.step = GROUP;
            others /= GROUP;
        }
        if (is_last(args.plan.arrived + at.row * args.units + at.unit, others))
            merge(at, parts, true);
    }

    // Of workers first, first + step, ... up to last: all but the first one's begin where their runs begin.
    struct Parts {
        int first, last, step, first_is_second;
        __device__ int64_t place(int w) const { return 2 * w + (w == first ? first_is_second : 0); }
    };

    // Whether so many others have come before; what they wrote is then to be seen.
    __device__ bool is_last(int32_t *counter, int others) const {
        __threadfence();
        __syncwarp();
        int before = 0;
        if (lane == 0)
            before = atomicAdd(counter, 1);
        before = __shfl_sync(ALL, before, 0);
        if (before != others)
            return false;
        __threadfence();
        if (lane == 0)
            *counter = 0;
        return true;
    }

    // Into the result, or into the first of the parts. All heads at once, so that many loads are under way.
    __device__ void merge(const Cursor &at, const Parts &parts, bool whole) const {
        constexpr int AT_ONCE = 4; // times 4 elements of a lane
        const int heads = heads_of(at), elements = heads * D;
        const auto stats = [&](int w, int head) { return __ldcg(&args.plan.max_and_sum[parts.place(w) * HEADS + head]); };
        float my_max = -INFINITY, sum = 0.f; // of head lane % HEADS
#pragma unroll 2
        for (int w = parts.first + lane / HEADS * parts.step; w <= parts.last; w += 32 / HEADS * parts.step) {
            const float2 of = stats(w, lane % HEADS);
            const float m = fmaxf(my_max, of.x);
            sum = sum * exp2f(my_max - m) + of.y * exp2f(of.x - m);
            my_max = m;
        }
        float max = my_max;
        for (int step = HEADS; step < 32; step *= 2)
            max = fmaxf(max, __shfl_xor_sync(ALL, max, step));
        sum *= exp2f(my_max - max);
        for (int step = HEADS; step < 32; step *= 2)
            sum += __shfl_xor_sync(ALL, sum, step);

        for (int base = lane * 4; base - lane * 4 < elements; base += AT_ONCE * 128) {
            float4 o[AT_ONCE];
            float max_of[AT_ONCE], by[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int head = min(base + i * 128, elements - 1) / D;
                o[i] = make_float4(0.f, 0.f, 0.f, 0.f);
                max_of[i] = __shfl_sync(ALL, max, head);
                by[i] = 1.f / __shfl_sync(ALL, sum, head);
            }
#pragma unroll 2
            for (int w = parts.first; w <= parts.last; w += parts.step) {
                const float4 *from = reinterpret_cast<const float4 *>(args.plan.sum_v + parts.place(w) * HEADS * D);
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    const int element = min(base + i * 128, elements - 4);
                    const float weight = exp2f(stats(w, element / D).x - max_of[i]);
                    const float4 v = __ldcg(from + element / 4);
                    o[i].x += weight * v.x;
                    o[i].y += weight * v.y;
                    o[i].z += weight * v.z;
                    o[i].w += weight * v.w;
                }
            }
            float *const raw = args.plan.sum_v + parts.place(parts.first) * HEADS * D;
            __syncwarp(); // lanes behind the end have read the last word
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int element = base + i * 128;
                if (element >= elements)
                    break;
                if (!whole) {
                    *reinterpret_cast<float4 *>(raw + element) = o[i];
                    continue;
                }
                uint32_t *const out = reinterpret_cast<uint32_t *>(out_of(at, element / D) + element % D);
                out[0] = pack(o[i].x * by[i], o[i].y * by[i], T{});
                out[1] = pack(o[i].z * by[i], o[i].w * by[i], T{});
            }
        }
        __syncwarp(); // all have read the maxima
        if (!whole && lane < HEADS)
            args.plan.max_and_sum[parts.place(parts.first) * HEADS + lane] = make_float2(max, sum);
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
    const int run = args.plan.run[0], total = args.plan.run[1];
    const int64_t run_begin = int64_t{worker} * run;
    if (run_begin >= total)
        return;
    const int run_end = static_cast<int>(min(run_begin + run, int64_t{total}));
    Cursor at = begin(args, args.plan.starts[worker], static_cast<int>(run_begin));
    constexpr int BYTES = TILE_BYTES<D>;
    const int stages = args.stages;
    const uint32_t ring = shared_address(shared) + warp * stages * BYTES;
    const uint32_t ring_end = ring + stages * BYTES;

    Loader<T, D> loader(args, at, lane);
    bool more = true;
    uint32_t load_at = ring;
    const auto load = [&] {
        if (more) {
            loader.load(load_at);
            more = loader.at.next_place() < run_end;
            if (more)
                loader.next();
        }
        end_group(); // empty ones too: groups are counted
        load_at += BYTES;
        if (load_at == ring_end)
            load_at = ring;
    };
    for (int i = 1; i < stages; i++)
        load();

    const Finish<T, D, N> finish{args, worker, lane};
    Sums<T, D, N> sums;
    bool whole = at.tile == 0, at_start = true; // of what is taken of this unit
    uint32_t take_at = ring;
    sums.begin(args, at, lane);
    for (;;) {
        load();
        await_groups(stages - 1);
        __syncwarp();
        sums.take(take_at, at.length - at.tile * TILE, args.scale_log2, lane);
        __syncwarp(); // all have read before any asks for the next tile there
        take_at += BYTES;
        if (take_at == ring_end)
            take_at = ring;
        const bool last = at.tile + 1 == at.tiles, over = at.next_place() >= run_end;
        if (last || over) {
            sums.end();
            if (whole && last)
                finish.whole(at, sums);
            else
                finish.part(at, sums, at_start);
            if (over)
                break;
            at_start = false;
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
