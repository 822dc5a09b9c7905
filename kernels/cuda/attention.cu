// Decode attention: arguments, the partition of the work, and which kernel does it.

#include <algorithm>
#include <cmath>

#include <ptx.cuh>

#include "attention.h"
#include "check.h"
#include "device.h"

namespace {

using namespace neo;

constexpr double LOG2_E = 1.4426950408889634;
constexpr int PLAN_THREADS = 1024;
// Of shared memory, what a block needs beside its own.
constexpr int RESERVED_BYTES = 1024;
// Blocks of 4 warps that share a multiprocessor, and what the ring of one holds: two tiles of each warp with heads of 128.
// On an H200 more, in flight or in blocks, was slower with 64 sequences of 1024 tokens, and no faster with most others.
constexpr int CTAS_OF_SM = 2, RING_BYTES = 64 * 1024;
constexpr int MOST_CTAS_OF_SM = 4; // where a warp has one tile, and other warps must fill its waits

__device__ int places_of_unit(const Attention &args, int row) {
    return args.lengths[row] > 0 ? (args.lengths[row] + TILE - 1) / TILE + UNIT_COST : 0;
}

// Inclusive sum over the block; `sums` has a place for each warp. All threads call it.
__device__ int scan(int x, int *sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, x, step);
        x += lane >= step ? other : 0;
    }
    if (lane == 31)
        sums[warp] = x;
    __syncthreads();
    if (warp == 0) {
        int total = sums[lane];
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, total, step);
            total += lane >= step ? other : 0;
        }
        sums[lane] = total;
    }
    __syncthreads();
    const int result = x + (warp > 0 ? sums[warp - 1] : 0);
    __syncthreads();
    return result;
}

// Where the run that begins at `place` of all has its beginning.
__device__ Start find(const Attention &args, int place) {
    int low = 0, high = args.rows; // the last row that does not begin later is in between; empty ones come before it
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (args.plan.begins[middle] <= place)
            low = middle;
        else
            high = middle;
    }
    const int in_row = place - args.plan.begins[low], of_unit = places_of_unit(args, low);
    return Start{low, in_row / of_unit, in_row % of_unit, args.lengths[low]};
}

// One block.
__global__ void __launch_bounds__(PLAN_THREADS) make_plan(const __grid_constant__ Attention args) {
    __shared__ int sums[32];
    __shared__ int so_far;
    if (threadIdx.x == 0)
        so_far = 0;
    for (int i = threadIdx.x; i < args.rows * args.units; i += PLAN_THREADS)
        args.plan.arrived[i] = 0;
    for (int i = threadIdx.x; i < 2 * args.workers; i += PLAN_THREADS)
        args.plan.grouped[i] = 0;
    __syncthreads();
    for (int first = 0; first < args.rows; first += PLAN_THREADS) {
        const int row = first + static_cast<int>(threadIdx.x);
        const int places = row < args.rows ? places_of_unit(args, row) * args.units : 0;
        const int end = so_far + scan(places, sums);
        if (row < args.rows)
            args.plan.begins[row] = end - places;
        __syncthreads();
        if (threadIdx.x == PLAN_THREADS - 1)
            so_far = end;
        __syncthreads();
    }
    const int total = so_far;
    const int run = max((total + args.workers - 1) / args.workers, SHORTEST_RUN);
    if (threadIdx.x == 0) {
        args.plan.run[0] = run;
        args.plan.run[1] = total;
    }
    for (int w = threadIdx.x; w < args.workers; w += PLAN_THREADS)
        args.plan.starts[w] = static_cast<int64_t>(w) * run < total ? find(args, w * run) : Start{};
}

// How the kernel is laid out on this device; workers 0: the plain kernel.
struct Geometry {
    int n, units, cuts, ctas, workers, stages;
};

neo_cuda_status geometry_of(const neo_cuda_decode &args, Geometry &geometry) noexcept {
    geometry = Geometry{};
    const neo_cuda_cache &cache = *args.cache;
    if (cache.dtype == NEO_CUDA_FP32)
        return NEO_CUDA_OK;
    Device device{};
    NEO_TRY(current_device(device));
    if (cache.dtype == NEO_CUDA_BF16 && device.capability < 80)
        return NEO_CUDA_OK;
    const int group = args.q_heads / cache.kv_heads;
    const bool has_wide = cache.head_dim == 64 || cache.head_dim == 128;
    geometry.n = group > HEADS_OF_MMA && has_wide ? 2 : 1;
    geometry.cuts = (group + HEADS_OF_MMA * geometry.n - 1) / (HEADS_OF_MMA * geometry.n);
    geometry.units = geometry.cuts * cache.kv_heads;
    const int stage = WARPS_OF_CTA * tile_bytes(cache.head_dim);
    const int fair = device.shared_of_sm / CTAS_OF_SM - RESERVED_BYTES;
    const int room = std::min({device.shared_of_block, fair, RING_BYTES});
    int stages = args.stages > 0 ? args.stages : std::clamp(room / stage, 1, MAX_STAGES);
    if (args.stages == 0 && stages == 1 && device.capability >= 80 && 2 * stage <= device.shared_of_block)
        stages = 2; // one block a multiprocessor that reads ahead, rather than two that wait
    if (stages * stage > device.shared_of_block)
        return fail(NEO_CUDA_BAD_ARGUMENT, "stages: %d of %d bytes each do not fit the device's %d bytes", stages, stage,
                    device.shared_of_block);
    const int most = stages == 1 ? MOST_CTAS_OF_SM : CTAS_OF_SM;
    const int fit = std::clamp(device.shared_of_sm / (stages * stage + RESERVED_BYTES), 1, most);
    geometry.stages = stages;
    geometry.ctas = args.ctas > 0 ? args.ctas : fit * device.multiprocessors;
    geometry.workers = geometry.ctas * WARPS_OF_CTA;
    return NEO_CUDA_OK;
}

int64_t up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Where the parts of the workspace lie; returns its size.
int64_t lay_out(const neo_cuda_decode &args, const Geometry &geometry, void *workspace, Plan &plan) noexcept {
    char *const base = static_cast<char *>(workspace);
    const int64_t parts = int64_t{2} * geometry.workers * HEADS_OF_MMA * geometry.n;
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
        char *const place = base == nullptr ? nullptr : base + at;
        at += up(bytes);
        return place;
    };
    plan.run = reinterpret_cast<int32_t *>(take(4 * sizeof(int32_t)));
    plan.starts = reinterpret_cast<Start *>(take(geometry.workers * static_cast<int64_t>(sizeof(Start))));
    plan.begins = reinterpret_cast<int32_t *>(take(int64_t{4} * args.rows));
    plan.arrived = reinterpret_cast<int32_t *>(take(int64_t{4} * args.rows * geometry.units));
    plan.grouped = reinterpret_cast<int32_t *>(take(int64_t{8} * geometry.workers));
    plan.max_and_sum = reinterpret_cast<float2 *>(take(parts * static_cast<int64_t>(sizeof(float2))));
    plan.sum_v = reinterpret_cast<float *>(take(parts * args.cache->head_dim * 4));
    return at;
}

neo_cuda_status check_shape(const neo_cuda_decode *args) noexcept {
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check(args->cache));
    const int32_t kv_heads = args->cache->kv_heads;
    NEO_NEED(args->rows >= 0, "rows is %d, must not be negative", args->rows);
    NEO_NEED(args->q_heads > 0 && args->q_heads % kv_heads == 0,
             "q_heads is %d, must be a positive multiple of kv_heads (%d)", args->q_heads, kv_heads);
    NEO_NEED(args->ctas >= 0 && args->ctas <= 65535, "ctas is %d, must be 0 to 65535", args->ctas);
    NEO_NEED(args->stages >= 0 && args->stages <= MAX_STAGES, "stages is %d, must be 0 to %d", args->stages, MAX_STAGES);
    return NEO_CUDA_OK;
}

neo_cuda_status check_rows(const neo_cuda_decode &args) noexcept {
    NEO_TRY(check_table(args.block_tables, args.table_stride));
    NEO_NEED(args.q != nullptr && args.out != nullptr, "q and out must not be NULL");
    NEO_NEED(args.lengths != nullptr, "lengths must not be NULL");
    NEO_NEED(aligned(args.q, 4) && aligned(args.out, 4), "q and out must be aligned to 4 bytes");
    const int64_t strides[] = {args.q_stride, args.q_head_stride, args.out_stride, args.out_head_stride};
    for (const int64_t stride : strides)
        NEO_NEED(stride >= 0 && stride % 2 == 0, "strides of q and out must be even and not negative, one is %lld",
                 static_cast<long long>(stride));
    NEO_NEED(args.out_head_stride >= args.cache->head_dim || args.q_heads == 1,
             "out_head_stride is %lld, less than head_dim", static_cast<long long>(args.out_head_stride));
    NEO_NEED(std::isfinite(args.scale), "scale must be finite");
    return NEO_CUDA_OK;
}

// Arguments of the kernels; the workspace is checked where there is one.
neo_cuda_status describe(const neo_cuda_decode &args, const Geometry &geometry, Attention &attention) noexcept {
    const neo_cuda_cache &cache = *args.cache;
    attention = Attention{};
    if (geometry.workers > 0) {
        NEO_NEED(args.workspace != nullptr, "workspace must not be NULL");
        NEO_NEED(aligned(args.workspace, 16), "workspace must be aligned to 16 bytes");
        const int64_t bytes = lay_out(args, geometry, args.workspace, attention.plan);
        NEO_NEED(args.workspace_bytes >= static_cast<size_t>(bytes), "workspace has %zu bytes, %lld are needed",
                 args.workspace_bytes, static_cast<long long>(bytes));
    }
    attention.cache = cache.data;
    attention.q = args.q;
    attention.out = args.out;
    attention.q_stride = args.q_stride;
    attention.q_head_stride = args.q_head_stride;
    attention.out_stride = args.out_stride;
    attention.out_head_stride = args.out_head_stride;
    attention.head_stride = int64_t{2} * cache.head_dim * cache.block_size;
    attention.block_stride = attention.head_stride * cache.kv_heads;
    attention.tables = args.block_tables;
    attention.slots = args.slots;
    attention.lengths = args.lengths;
    attention.table_stride = args.table_stride;
    attention.rows = args.rows;
    attention.q_heads = args.q_heads;
    attention.kv_heads = cache.kv_heads;
    attention.group = args.q_heads / cache.kv_heads;
    attention.units = geometry.units;
    attention.cuts = geometry.cuts;
    attention.head_dim = cache.head_dim;
    attention.block_shift = cache.block_size == 8 ? 3 : cache.block_size == 16 ? 4 : 5;
    attention.workers = geometry.workers;
    attention.stages = geometry.stages;
    attention.scale_log2 = static_cast<float>(args.scale * LOG2_E);
    attention.early = args.early;
    attention.release = release_wanted() ? 1 : 0;
    return NEO_CUDA_OK;
}

} // namespace

extern "C" neo_cuda_status neo_cuda_decode_workspace(const neo_cuda_decode *args, size_t *bytes) {
    clear_error();
    NEO_TRY(check_shape(args));
    NEO_NEED(bytes != nullptr, "bytes must not be NULL");
    Geometry geometry{};
    NEO_TRY(geometry_of(*args, geometry));
    Plan plan{};
    *bytes = geometry.workers == 0 ? 0 : static_cast<size_t>(lay_out(*args, geometry, nullptr, plan));
    return NEO_CUDA_OK;
}

extern "C" neo_cuda_status neo_cuda_decode_plan(const neo_cuda_decode *args, void *stream) {
    clear_error();
    NEO_TRY(check_shape(args));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    NEO_NEED(args->lengths != nullptr, "lengths must not be NULL");
    Geometry geometry{};
    NEO_TRY(geometry_of(*args, geometry));
    if (geometry.workers == 0)
        return NEO_CUDA_OK;
    Attention attention{};
    NEO_TRY(describe(*args, geometry, attention));
    launch_kernel(make_plan, 1, PLAN_THREADS, 0, static_cast<cudaStream_t>(stream), attention);
    return launched("planning decode attention");
}

extern "C" neo_cuda_status neo_cuda_decode_attention(const neo_cuda_decode *args, void *stream) {
    clear_error();
    NEO_TRY(check_shape(args));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    NEO_TRY(check_rows(*args));
    Geometry geometry{};
    NEO_TRY(geometry_of(*args, geometry));
    Attention attention{};
    NEO_TRY(describe(*args, geometry, attention));
    const auto on = static_cast<cudaStream_t>(stream);
    const int32_t dtype = args->cache->dtype;
    if (geometry.workers == 0)
        return from_cuda(launch_plain(attention, dtype, on), "decode attention");
    const auto launch = dtype == NEO_CUDA_FP16 ? launch_mma_f16 : launch_mma_bf16;
    return from_cuda(launch(attention, geometry.n, geometry.ctas, on), "decode attention");
}
