// Decode attention on tensor cores. Every warp is a worker of its own: no barrier, no other warp to wait for.
//
// With T tokens of a tile as m and the query heads of a KV head as n, both products take the cache as their left side:
//     S^T [tokens][heads] = K [tokens][d] Q^T [d][heads]        O^T [d][heads] += V^T [d][tokens] P^T [tokens][heads]
// K and V come through ldmatrix.trans from planes as they lie in the cache. A thread holds the same two heads in S^T
// and in O^T (columns 2 * (lane % 4) and the next), so maxima and sums stay where they are used; P^T, as a right side,
// is S^T's registers transposed by movmatrix. With up to 8 heads per KV head nothing of n is padding that costs time:
// the kernel waits for memory, not for the tensor cores.
//
// Two cursors walk the same run of tiles: one asks for tiles (cp.async, `stages` of them in a ring), one computes. Where
// the caller says that it may (`early`), the first tiles are asked for while the kernel ahead still appends the newest tokens.
#pragma once

#include "attention_merge.cuh"

namespace neo {

// Rows without tokens are in nobody's run.
template <class T, int D> __device__ void clear_empty(const Attention &args, int worker, int lane) {
    for (int row = worker; row < args.rows; row += args.workers)
        if (args.lengths[row] <= 0)
            for (int i = lane; i < args.q_heads * D; i += 32)
                static_cast<T *>(args.out)[row * args.out_stride + i / D * args.out_head_stride + i % D] =
                    from_float<T>(0.f);
}

// Blocks of which a multiprocessor has registers for; beside two of them, room is then left for the kernel ahead.
template <int D, int N> constexpr int CTAS_BY_REGISTERS = N == 1 && D <= 128 ? 3 : 2;

template <class T, int D, int N>
__global__ void __launch_bounds__(WARPS_OF_CTA * 32, CTAS_BY_REGISTERS<D, N>)
    attend(const __grid_constant__ Attention args) {
    NEO_DYNAMIC_SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int worker = blockIdx.x * WARPS_OF_CTA + warp;
    if (args.early == 0)
        await_previous();
    const Start start = args.plan.starts[worker]; // asked for together
    const int run = args.plan.run[0], total = args.plan.run[1];
    if (start.length <= 0) {
        await_previous();
        if (args.release != 0)
            release_next();
        clear_empty<T, D>(args, worker, lane);
        return;
    }
    const int64_t run_begin = int64_t{worker} * run;
    const int run_end = static_cast<int>(min(run_begin + run, int64_t{total}));
    Cursor at = begin(start, static_cast<int>(run_begin));
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
    for (int i = 1; i < stages; i++) {
        if (loader.is_newest())
            await_previous();
        load();
    }
    await_previous();
    if (args.release != 0)
        release_next();
    clear_empty<T, D>(args, worker, lane);

    const Finish<T, D, N> finish{args, worker, lane};
    Sums<T, D, N> sums;
    bool whole = at.tile == 0, at_start = true; // of what is taken of this unit
    uint32_t take_at = ring;
    sums.begin(args, at, lane);
    for (;;) {
        load();
        await_groups(stages - 1);
        __syncwarp();
        sums.take(take_at, at.length - at.tile * TILE, args.block_shift, args.scale_log2, lane);
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
    launch_overlapping(attend<T, D, N>, ctas, WARPS_OF_CTA * 32, bytes, stream, args);
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
