// out = x W^T + bias for few rows of x, which waits for W alone: it is read once, in whole lines, through a ring in shared
// memory that is filled before the kernel ahead on the stream has ended.
//
// Tensor cores take W as their left side, out^T [columns][rows] = W [columns][k] x^T [k][rows]: 16 rows of W are m, 8 rows
// of x are n, so that 8 rows cost an eighth of 64. A block takes `span` tiles of W at once, and of each as many steps of k
// as its part has; x comes with every step, once for all tiles of the block. Where tiles are few, blocks of a cluster share
// tiles and each takes a part of k; sums then pass through shared memory, and are added in the order of the parts: the same
// shape on the same device gives the same bits.
#pragma once

#include <ptx.cuh>

#include "project.h"

namespace neo {

// Which tiles and steps are a block's. Tiles are taken in rounds of `span` at most.
struct ProjectShare {
    int first, count, rounds, step, steps;

    __device__ explicit ProjectShare(const Project &args) {
        const int group = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
        first = static_cast<int>(int64_t{args.tiles} * group / args.groups);
        count = static_cast<int>(int64_t{args.tiles} * (group + 1) / args.groups) - first;
        rounds = (count + args.span - 1) / args.span;
        step = args.steps * part / args.parts;
        steps = args.steps * (part + 1) / args.parts - step;
    }
    __device__ int tile(int round) const { return first + count * round / rounds; }
};

// Brings steps into shared memory: [tiles of W | rows of x], lines of 128 bytes whose 16-byte words have changed places
// with word ^ row % 8, so that the 8 rows of a matrix lie in different banks. Addresses are kept and moved on: the loads
// of a step cost about as many instructions as there are copies.
template <class T, int ROWS> struct ProjectLoader {
    static constexpr int COPIES = (ROWS * 8 + PROJECT_THREADS - 1) / PROJECT_THREADS; // of x by a thread
    static constexpr int WARPS = PROJECT_THREADS / 32;

    const Project &args;
    const ProjectShare &share;
    int round = 0, left, tiles, k; // left: steps of the round; k: where this thread's word of the step lies
    const T *weight;               // that word in the first of this warp's rows
    const T *x[COPIES];

    __device__ ProjectLoader(const Project &a, const ProjectShare &s) : args(a), share(s) { begin_round(); }

    __device__ static int word() { return threadIdx.x % 8; }
    __device__ static int row_of_x(int copy) { return (copy * PROJECT_THREADS + threadIdx.x) / 8; }

    __device__ void begin_round() {
        const int tile = share.tile(round), row = threadIdx.x / 32 * PROJECT_TILE + threadIdx.x % 32 / 8;
        tiles = share.tile(round + 1) - tile;
        left = share.steps;
        k = share.step * PROJECT_STEP + word() * 8;
        weight = static_cast<const T *>(args.weight) + (int64_t{tile} * PROJECT_TILE + row) * args.weight_stride + k;
#pragma unroll
        for (int i = 0; i < COPIES; i++)
            x[i] = static_cast<const T *>(args.x) + (row_of_x(i) < args.rows ? row_of_x(i) : 0) * args.x_stride + k;
    }
    __device__ bool more() const { return left > 0; }
    __device__ void next() {
        k += PROJECT_STEP;
        weight += PROJECT_STEP;
#pragma unroll
        for (int i = 0; i < COPIES; i++)
            x[i] += PROJECT_STEP;
        if (--left == 0 && ++round < share.rounds)
            begin_round();
    }

    // Words behind the end become zeros; their addresses are those of others in the row.
    __device__ void weights(uint32_t to) const {
        const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 8;
        const bool valid = k < args.width;
        const T *const from = weight - (valid ? 0 : word() * 8);
        to += (warp * PROJECT_TILE + row) * PROJECT_LINE_BYTES;
#pragma unroll
        for (int i = 0; i < PROJECT_WARP_TILES; i++) {
            if (warp + i * WARPS >= tiles)
                break;
#pragma unroll
            for (int r = 0; r < PROJECT_TILE; r += 4) {
                const int down = i * WARPS * PROJECT_TILE + r;
                copy_16(to + down * PROJECT_LINE_BYTES + (word() ^ row ^ (r & 4)) * 16, from + down * args.weight_stride,
                        valid);
            }
        }
    }

    __device__ void rows(uint32_t to) const {
        to += args.span * PROJECT_TILE * PROJECT_LINE_BYTES;
        const bool valid = k < args.width;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int row = row_of_x(i);
            if (ROWS * 8 < PROJECT_THREADS && row >= ROWS) // whole warps
                break;
            copy_16(to + row * PROJECT_LINE_BYTES + (word() ^ (row & 7)) * 16, x[i] - (valid ? 0 : word() * 8),
                    valid && row < args.rows);
        }
    }
};

// Sums of a warp: its tiles times all rows of x. HALVES: of half of each step.
template <class T, int ROWS, bool HALVES> struct ProjectSums {
    static constexpr int GROUPS = HALVES ? 4 : 8; // of warps with the same tiles
    static constexpr int KS = HALVES ? 2 : 4;     // products of 16 in a step
    static constexpr int N = ROWS / 8;
    float c[PROJECT_WARP_TILES][N][4]; // rows (of W) lane / 4 and + 8, columns (rows of x) 2 * (lane % 4) and + 1

    static __device__ int strip() { return threadIdx.x / 32 % GROUPS * PROJECT_WARP_TILES; } // first tile
    static __device__ int half() { return threadIdx.x / 32 / GROUPS; }

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < PROJECT_WARP_TILES * N * 4; i++)
            c[i / (N * 4)][i / 4 % N][i % 4] = 0.f;
    }

    __device__ void take(uint32_t weights, uint32_t rows) {
        const int lane = threadIdx.x % 32, r = lane % 8;
        const uint32_t half_at = half() * 64;
        const uint32_t a_at = weights + (strip() * PROJECT_TILE + lane % 16) * PROJECT_LINE_BYTES +
                              (((lane / 16 ^ r) * 16) ^ half_at);
        const uint32_t b_at = rows + (lane / 16 * 8 % ROWS + r) * PROJECT_LINE_BYTES + (((lane / 8 % 2 ^ r) * 16) ^ half_at);
#pragma unroll
        for (int k = 0; k < KS; k++) {
            uint32_t a[PROJECT_WARP_TILES][4], b[(N + 1) / 2][4];
#pragma unroll
            for (int i = 0; i < PROJECT_WARP_TILES; i++)
                load_matrices(a[i], (a_at ^ k * 32) + i * PROJECT_TILE * PROJECT_LINE_BYTES);
#pragma unroll
            for (int n = 0; n < (N + 1) / 2; n++)
                load_matrices(b[n], (b_at ^ k * 32) + n * 16 * PROJECT_LINE_BYTES);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < PROJECT_WARP_TILES; i++) {
                    const uint32_t of_n[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                    mma(c[i][n], a[i], of_n, T{});
                }
        }
    }

    // Into the result, from `tile` on.
    __device__ void store(const Project &args, int tile, int tiles) const {
        const int lane = threadIdx.x % 32;
        const T *const bias = static_cast<const T *>(args.bias);
#pragma unroll
        for (int i = 0; i < PROJECT_WARP_TILES; i++) {
            if (strip() + i >= tiles)
                return;
            const int column = (tile + strip() + i) * PROJECT_TILE;
            float add[2] = {0.f, 0.f};
            if (bias != nullptr) {
                add[0] = to_float(bias[column + lane / 4]);
                add[1] = to_float(bias[column + lane / 4 + 8]);
            }
            T *const out = static_cast<T *>(args.out) + lane / 4 * args.out_stride + column + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < N; n++) {
                uint32_t pairs[2];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    pairs[h] = transpose(pack(c[i][n][2 * h] + add[h], c[i][n][2 * h + 1] + add[h], T{}));
                if (n * 8 + lane / 4 >= args.rows)
                    continue;
#pragma unroll
                for (int h = 0; h < 2; h++)
                    *reinterpret_cast<uint32_t *>(out + n * 8 * args.out_stride + 8 * h) = pairs[h];
            }
        }
    }

    // Calls put(place, sum) for places in a plane of sums, [rows of x][pitch].
    template <class Put> __device__ void each(int pitch, Put put) const {
        const int lane = threadIdx.x % 32;
        const int first = lane % 4 * 2 * pitch + strip() * PROJECT_TILE + lane / 4;
#pragma unroll
        for (int i = 0; i < PROJECT_WARP_TILES; i++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    put(first + (n * 8 + j % 2) * pitch + i * PROJECT_TILE + j / 2 * 8, c[i][n][j]);
    }
};

// The sums of a cluster's blocks, each of a part of k, into the result: every block adds its share of all places.
template <class T> __device__ void add_parts(const Project &args, const float *plane, int tile, int tiles) {
    const int part = blockIdx.x % args.parts, pitch = project_pitch(args.span);
    const int of_row = tiles * PROJECT_TILE / 4;
    const T *const bias = static_cast<const T *>(args.bias);
    if (args.parts > 1)
        sync_cluster();
    else
        __syncthreads();
    for (int at = part * PROJECT_THREADS + threadIdx.x; at < args.rows * of_row; at += args.parts * PROJECT_THREADS) {
        const int row = at / of_row, in_row = at % of_row * 4, column = tile * PROJECT_TILE + in_row;
        const float *const mine = plane + row * pitch + in_row;
        float4 sum = *reinterpret_cast<const float4 *>(mine);
        if (args.parts > 1)
            sum = load_shared_of(shared_address(mine), 0);
#pragma unroll 4
        for (int p = 1; p < args.parts; p++) {
            const float4 x = load_shared_of(shared_address(mine), p);
            sum.x += x.x;
            sum.y += x.y;
            sum.z += x.z;
            sum.w += x.w;
        }
        if (bias != nullptr) {
            sum.x += to_float(bias[column]);
            sum.y += to_float(bias[column + 1]);
            sum.z += to_float(bias[column + 2]);
            sum.w += to_float(bias[column + 3]);
        }
        uint32_t *const out = reinterpret_cast<uint32_t *>(static_cast<T *>(args.out) + row * args.out_stride + column);
        out[0] = pack(sum.x, sum.y, T{});
        out[1] = pack(sum.z, sum.w, T{});
    }
    if (args.parts > 1)
        sync_cluster(); // nobody leaves while others still read its sums
}

template <class T, int ROWS, bool HALVES>
__global__ void __launch_bounds__(PROJECT_THREADS) project(const __grid_constant__ Project args) {
    NEO_DYNAMIC_SHARED(shared);
    const ProjectShare share(args);
    const int stages = args.stages;
    const uint32_t ring = shared_address(shared), stage_bytes = project_stage_bytes(args.span, ROWS);
    const uint32_t ring_end = ring + stages * stage_bytes;
    const uint32_t rows_at = args.span * PROJECT_TILE * PROJECT_LINE_BYTES; // in a stage

    using Loader = ProjectLoader<T, ROWS>;
    Loader loader(args, share);
    {
        Loader first = loader; // weights are there already, x is what the kernel ahead may still write
        uint32_t at = ring;
        for (int i = 1; i < stages && first.more(); i++, first.next(), at += stage_bytes)
            first.weights(at);
    }
    await_previous();
    release_next(); // only now: what the next kernel reads before it waits was there before this one began
    uint32_t load_at = ring;
    for (int i = 1; i < stages; i++, load_at += stage_bytes) {
        if (loader.more()) {
            loader.rows(load_at);
            loader.next();
        }
        end_group(); // the first of them has all those weights; empty ones are counted too
    }

    ProjectSums<T, ROWS, HALVES> sums;
    uint32_t take_at = ring;
    for (int round = 0; round < share.rounds; round++) {
        sums.clear();
        const int tile = share.tile(round), tiles = share.tile(round + 1) - tile;
        for (int i = 0; i < share.steps; i++) {
            await_groups(stages - 2);
            __syncthreads(); // this step is there for all, and all have taken the one before
            if (loader.more()) {
                loader.weights(load_at);
                loader.rows(load_at);
                loader.next();
            }
            end_group();
            load_at = load_at + stage_bytes == ring_end ? ring : load_at + stage_bytes;
            if (sums.strip() < tiles)
                sums.take(take_at, take_at + rows_at);
            take_at = take_at + stage_bytes == ring_end ? ring : take_at + stage_bytes;
        }
        if (!HALVES && args.parts == 1)
            sums.store(args, tile, tiles);
    }
    if (!HALVES && args.parts == 1)
        return;

    // One round: the ring has served.
    float *const plane = reinterpret_cast<float *>(shared);
    __syncthreads();
    const int pitch = project_pitch(args.span);
    const bool there = sums.strip() < share.count; // sums of a tile behind the last are written to places nobody reads
    if (there && (!HALVES || sums.half() == 1))
        sums.each(pitch, [&](int place, float x) { plane[place] = x; });
    if (HALVES) {
        __syncthreads();
        if (there && sums.half() == 0)
            sums.each(pitch, [&](int place, float x) { plane[place] += x; });
    }
    add_parts<T>(args, plane, share.first, share.count);
}

template <class T, int ROWS, bool HALVES>
cudaError_t launch_project_one(const Project &args, const ProjectLaunch &how, cudaStream_t stream) noexcept {
    const auto kernel = project<T, ROWS, HALVES>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.bytes);
    if (error != cudaSuccess)
        return error;
    const unsigned blocks = static_cast<unsigned>(args.groups) * args.parts;
    launch_clusters(kernel, blocks, PROJECT_THREADS, how.bytes, stream, args.parts, how.overlapping, args);
    return cudaGetLastError();
}

template <class T, bool HALVES>
cudaError_t launch_project_rows(const Project &args, const ProjectLaunch &how, cudaStream_t stream) noexcept {
    switch (how.row_tile) {
    case 8: return launch_project_one<T, 8, HALVES>(args, how, stream);
    case 16: return launch_project_one<T, 16, HALVES>(args, how, stream);
    case 32: return launch_project_one<T, 32, HALVES>(args, how, stream);
    case 64: return launch_project_one<T, 64, HALVES>(args, how, stream);
    default: return cudaErrorInvalidValue;
    }
}

template <class T>
cudaError_t launch_project(const Project &args, const ProjectLaunch &how, cudaStream_t stream) noexcept {
    return how.halves ? launch_project_rows<T, true>(args, how, stream) : launch_project_rows<T, false>(args, how, stream);
}

} // namespace neo
