// From a row of the fused projection to rotated q, k and v, and into the cache. Here a warp takes one head of one row; many
// rows at once are in qkv_many.cuh.

#include <ptx.cuh>

#include "check.h"
#include "qkv_many.cuh"

namespace {

using namespace neo;

constexpr int FEW_CTAS = 6; // on a multiprocessor: half of its registers are left for attention

template <class T, int V> struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Some {
    T at[V];
};

// Elements of a head that a lane has, V neighbours at a time: elements (32 i + lane) V and so on of each half. HALF: what a
// half has at most.
template <class T, int V, int HALF> struct Elements {
    static constexpr int PIECES = HALF / 32 / V;
    Some<T, V> at[PIECES][2];

    // Calls use(index of the piece, which half, element's number) for all that the head has.
    template <class Use> static __device__ __forceinline__ void each(int half, int lane, Use use) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int d = (i * 32 + lane) * V;
            if (d < half) {
                use(i, 0, d);
                use(i, 1, d + half);
            }
        }
    }
    __device__ __forceinline__ void load(const T *from, int half, int lane) {
        each(half, lane, [&](int i, int h, int d) { at[i][h] = *reinterpret_cast<const Some<T, V> *>(from + d); });
    }
    __device__ __forceinline__ void store(T *to, int half, int lane) const {
        each(half, lane, [&](int i, int h, int d) { *reinterpret_cast<Some<T, V> *>(to + d) = at[i][h]; });
    }
    // Element d to to[d * step].
    __device__ __forceinline__ void store_apart(T *to, int step, int half, int lane) const {
        each(half, lane, [&](int i, int h, int d) {
#pragma unroll
            for (int j = 0; j < V; j++)
                to[(d + j) * step] = at[i][h].at[j];
        });
    }
    template <class Of> __device__ __forceinline__ void change(int half, int lane, Of of) {
        each(half, lane, [&](int i, int h, int d) {
#pragma unroll
            for (int j = 0; j < V; j++)
                of(i, h, j, d + j);
        });
    }
};

// Scale, bias, norm and, unless it is a head of v, rotation in fp32; rounded once.
template <class T, int V, int HALF>
__device__ __forceinline__ void transform(Elements<T, V, HALF> &head, const T *bias, const T *norm, bool is_v,
                                          const Elements<T, V, HALF> &cos, const Elements<T, V, HALF> &sin, float eps,
                                          float by, int half, int lane) {
    float x[Elements<T, V, HALF>::PIECES][2][V] = {}; // zeros where the head ends
    head.change(half, lane, [&](int i, int h, int j, int d) {
        x[i][h][j] = to_float(head.at[i][h].at[j]) * by + (bias != nullptr ? to_float(bias[d]) : 0.f);
    });
    if (norm != nullptr) {
        float square = 0.f;
        head.change(half, lane, [&](int i, int h, int j, int) { square += x[i][h][j] * x[i][h][j]; });
        const float unit = rsqrtf(warp_sum(square) / static_cast<float>(2 * half) + eps);
        head.change(half, lane, [&](int i, int h, int j, int d) { x[i][h][j] *= unit * to_float(norm[d]); });
    }
    head.change(half, lane, [&](int i, int h, int j, int) {
        const float turned = x[i][h][j] * to_float(cos.at[i][h].at[j]) + x[i][1 - h][j] * to_float(sin.at[i][h].at[j]);
        head.at[i][h].at[j] = from_float<T>(is_v ? x[i][h][j] : turned);
    });
}

template <class T, int V, int HALF>
__global__ void __launch_bounds__(ROPE_WARPS * 32, HALF <= 64 ? FEW_CTAS : 2) rope_append(const __grid_constant__ Qkv<T> args) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = blockIdx.y * ROPE_WARPS + warp;
    const int64_t row = blockIdx.x;
    const int D = args.head_dim, half = D / 2, q_heads = args.q_heads;
    const bool there = head < q_heads + 2 * args.kv_heads;
    __shared__ float sums[ROPE_WARPS];

    release_next();
    if (args.early == 0)
        await_previous();
    Elements<T, V, HALF> of, cos, sin; // all are asked for before any is used
    if (there) {
        cos.load(args.cos + row * D, half, lane);
        sin.load(args.sin + row * D, half, lane);
    }
    Target target{-1, 0};
    if (head >= q_heads)
        target = target_of(args, static_cast<int>(row));
    await_previous();
    if (there)
        of.load(args.qkv + row * args.qkv_stride + head * D, half, lane);
    const float by = args.scale.of(row, sums);
    if (!there)
        return;
    const bool is_q = head < q_heads, is_v = head >= q_heads + args.kv_heads;
    const int kv_head = head - q_heads - (is_v ? args.kv_heads : 0);
    transform(of, args.bias == nullptr ? nullptr : args.bias + head * D, is_v ? nullptr : is_q ? args.q_norm : args.k_norm,
              is_v, cos, sin, args.eps, by, half, lane);
    T *const out = is_q ? args.q_out : is_v ? args.v_out : args.k_out;
    if (out != nullptr)
        of.store(out + (is_q ? row * args.q_stride + head * D : row * args.kv_stride + kv_head * D), half, lane);
    if (is_q || target.number < 0)
        return;
    if (is_v)
        of.store(plane_of(args, target, kv_head) + (args.block + target.offset) * D, half, lane);
    else
        of.store_apart(plane_of(args, target, kv_head) + target.offset, args.block, half, lane);
}

// Whether so many neighbours, a power of two, can be taken at once everywhere.
bool in_groups(const neo_cuda_qkv &args, int group, size_t element) noexcept {
    const void *const pointers[] = {args.qkv, args.bias,  args.q_norm, args.k_norm, args.cos,
                                    args.sin, args.q_out, args.k_out,  args.v_out};
    for (const void *pointer : pointers) // NULL is aligned
        if (!aligned(pointer, group * element))
            return false;
    return args.qkv_stride % group == 0 && args.q_stride % group == 0 && args.kv_stride % group == 0;
}

// Whether v, to which nothing is done, is wanted where it lies already.
bool v_stays(const neo_cuda_qkv &args, size_t element) noexcept {
    const int64_t before = static_cast<int64_t>(args.q_heads + args.cache->kv_heads) * args.cache->head_dim;
    return args.bias == nullptr && args.scale.hidden == nullptr && args.kv_stride == args.qkv_stride &&
           args.v_out == static_cast<const char *>(args.qkv) + before * static_cast<int64_t>(element);
}

template <class T, int HALF> void launch_for(const neo_cuda_qkv &args, cudaStream_t stream) {
    const auto elements = [](const void *p) { return static_cast<const T *>(p); };
    const auto writable = [](void *p) { return static_cast<T *>(p); };
    const neo_cuda_cache &cache = *args.cache;
    const Qkv<T> kernel{writable(cache.data),
                        elements(args.qkv),
                        elements(args.bias),
                        elements(args.q_norm),
                        elements(args.k_norm),
                        elements(args.cos),
                        elements(args.sin),
                        writable(args.q_out),
                        writable(args.k_out),
                        v_stays(args, sizeof(T)) ? nullptr : writable(args.v_out),
                        args.qkv_stride,
                        args.q_stride,
                        args.kv_stride,
                        args.table_stride,
                        args.block_tables,
                        args.slots,
                        args.positions,
                        args.rows,
                        args.q_heads,
                        cache.kv_heads,
                        cache.head_dim,
                        cache.block_size,
                        args.early,
                        args.eps,
                        Scale<T, ROPE_WARPS * 32>(args.scale)};
    if constexpr (sizeof(T) == 2) // fp32 serves exact comparisons: a row's sums do not depend on the others there
        if (args.scale.hidden == nullptr && args.rows >= MANY_ROWS && args.rows <= MOST_ROWS && in_groups(args, Vec<T>::N, sizeof(T))) {
            launch_many(kernel, stream);
            return;
        }
    const int heads = args.q_heads + 2 * cache.kv_heads;
    const auto one = in_groups(args, 2, sizeof(T)) ? rope_append<T, 2, HALF> : rope_append<T, 1, HALF>;
    launch_overlapping(one, dim3(args.rows, (heads + ROPE_WARPS - 1) / ROPE_WARPS), ROPE_WARPS * 32, 0, stream, kernel);
}

template <class T> void launch(const neo_cuda_qkv &args, cudaStream_t stream) {
    if (args.cache->head_dim <= 128)
        launch_for<T, 64>(args, stream);
    else
        launch_for<T, 128>(args, stream);
}

neo_cuda_status check(const neo_cuda_qkv &args) noexcept {
    NEO_TRY(neo::check(args.cache));
    NEO_TRY(neo::check(args.scale));
    NEO_NEED(args.rows >= 0, "rows is %d, must not be negative", args.rows);
    NEO_NEED(args.q_heads > 0 && args.q_heads % args.cache->kv_heads == 0,
             "q_heads is %d, must be a positive multiple of kv_heads (%d)", args.q_heads, args.cache->kv_heads);
    if (args.rows == 0)
        return NEO_CUDA_OK;
    const int64_t D = args.cache->head_dim, kv = args.cache->kv_heads * D, q = args.q_heads * D;
    NEO_NEED(args.qkv != nullptr && args.q_out != nullptr, "qkv and q_out must not be NULL");
    NEO_NEED(args.cos != nullptr && args.sin != nullptr, "cos and sin must not be NULL");
    NEO_NEED((args.q_norm == nullptr) == (args.k_norm == nullptr), "q_norm and k_norm: one is NULL, the other not");
    NEO_NEED(args.qkv_stride >= q + 2 * kv, "qkv_stride is %lld, must be at least %lld",
             static_cast<long long>(args.qkv_stride), static_cast<long long>(q + 2 * kv));
    NEO_NEED(args.q_stride >= q, "q_stride is %lld, must be at least %lld", static_cast<long long>(args.q_stride),
             static_cast<long long>(q));
    const bool out = args.k_out != nullptr || args.v_out != nullptr;
    NEO_NEED(!out || args.kv_stride >= kv, "kv_stride is %lld, must be at least %lld",
             static_cast<long long>(args.kv_stride), static_cast<long long>(kv));
    if (args.block_tables != nullptr) {
        NEO_TRY(check_table(args.block_tables, args.table_stride));
        NEO_NEED(args.slots != nullptr && args.positions != nullptr, "slots and positions must not be NULL");
    }
    return NEO_CUDA_OK;
}

} // namespace

extern "C" neo_cuda_status neo_cuda_qkv_rope_append(const neo_cuda_qkv *args, void *stream) {
    clear_error();
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check(*args));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    const auto on = static_cast<cudaStream_t>(stream);
    if (args->cache->dtype == NEO_CUDA_FP32)
        launch<float>(*args, on);
    else if (args->cache->dtype == NEO_CUDA_FP16)
        launch<half_t>(*args, on);
    else
        launch<bf16_t>(*args, on);
    return launched("rotary embedding and append");
}
