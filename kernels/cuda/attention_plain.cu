// Decode attention without tensor cores, for fp32 caches (exact tests) and for bf16 where there are none: one block a
// row and query head. A warp takes 32 tokens at a time: a lane has one token's score, then some dimensions' sums.

#include <ptx.cuh>

#include "attention.h"

namespace {

using namespace neo;

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = 8;
constexpr int MAX_DIM = 256;
constexpr int PER_LANE = MAX_DIM / 32;

struct Shared {
    float q[MAX_DIM]; // times the scale
    float max[WARPS], sum[WARPS];
    float o[WARPS][MAX_DIM];
};

template <class T> __device__ float score(const T *k, const float *q, int head_dim, int block) {
    float sum = 0.f;
    for (int d = 0; d < head_dim; d++)
        sum = fmaf(q[d], to_float(k[d * block]), sum);
    return sum;
}

// Merges the warps' results; thread i writes dimension i.
template <class T> __device__ void merge(const Shared &shared, T *out, int head_dim) {
    float max = -INFINITY, sum = 0.f;
    for (int w = 0; w < WARPS; w++)
        max = fmaxf(max, shared.max[w]);
    if (max == -INFINITY)
        max = 0.f; // no tokens: all weights become 0
    for (int w = 0; w < WARPS; w++)
        sum += shared.sum[w] * exp2f(shared.max[w] - max);
    const int d = threadIdx.x;
    if (d >= head_dim)
        return;
    float o = 0.f;
    for (int w = 0; w < WARPS; w++)
        o += shared.o[w][d] * exp2f(shared.max[w] - max);
    out[d] = from_float<T>(sum > 0.f ? o / sum : 0.f);
}

template <class T> __global__ void __launch_bounds__(WARPS * 32) attend_plain(const __grid_constant__ Attention args) {
    __shared__ Shared shared;
    await_previous();
    const int row = blockIdx.x / args.q_heads, head = blockIdx.x % args.q_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int D = args.head_dim, block = 1 << args.block_shift;
    const T *q = static_cast<const T *>(args.q) + row * args.q_stride + head * args.q_head_stride;
    if (static_cast<int>(threadIdx.x) < D)
        shared.q[threadIdx.x] = to_float(q[threadIdx.x]) * args.scale_log2;
    __syncthreads();

    const int length = args.lengths[row];
    const int64_t slot = args.slots == nullptr ? row : args.slots[row];
    const int32_t *table = args.tables + slot * args.table_stride;
    const T *cache = static_cast<const T *>(args.cache) + head / args.group * args.head_stride;
    float max = -INFINITY, sum = 0.f, o[PER_LANE] = {};
    for (int begin = warp * 32; begin < length; begin += WARPS * 32) {
        const int token = begin + lane;
        float x = -INFINITY;
        if (token < length)
            x = score(cache + table[token >> args.block_shift] * args.block_stride + token % block, shared.q, D, block);
        const float now = fmaxf(max, warp_max(x)), alpha = exp2f(max - now), p = exp2f(x - now);
        max = now;
        sum = sum * alpha + p;
        for (int i = 0; i < PER_LANE; i++)
            o[i] *= alpha;
        for (int t = 0; t < min(32, length - begin); t++) {
            const int at = begin + t;
            const T *v = cache + table[at >> args.block_shift] * args.block_stride + D * block + at % block * D;
            const float weight = __shfl_sync(ALL, p, t);
            for (int i = 0; i < PER_LANE; i++)
                if (i * 32 + lane < D)
                    o[i] = fmaf(weight, to_float(v[i * 32 + lane]), o[i]);
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        shared.max[warp] = max;
        shared.sum[warp] = sum;
    }
    for (int i = 0; i < PER_LANE; i++)
        shared.o[warp][i * 32 + lane] = o[i];
    __syncthreads();
    merge(shared, static_cast<T *>(args.out) + row * args.out_stride + head * args.out_head_stride, D);
}

} // namespace

cudaError_t neo::launch_plain(const Attention &args, int dtype, cudaStream_t stream) noexcept {
    const unsigned blocks = static_cast<unsigned>(args.rows) * args.q_heads;
    if (dtype == NEO_CUDA_FP32)
        launch_overlapping(attend_plain<float>, blocks, WARPS * 32, 0, stream, args);
    else
        launch_overlapping(attend_plain<bf16_t>, blocks, WARPS * 32, 0, stream, args);
    return cudaGetLastError();
}
