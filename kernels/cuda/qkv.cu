// From a row of the fused projection to rotated q, k and v, and into the cache. A warp takes one head of one row.

#include <ptx.cuh>

#include "check.h"

namespace {

using namespace neo;

constexpr int WARPS = 8;
constexpr int PAIRS = 4; // (d, d + head_dim / 2) that a lane holds at most: head_dim up to 256

template <class T> struct Qkv {
    T *cache;
    const T *qkv, *bias, *q_norm, *k_norm, *cos, *sin;
    T *q_out, *k_out, *v_out;
    int64_t qkv_stride, q_stride, kv_stride, table_stride;
    const int32_t *tables, *slots, *positions;
    int32_t q_heads, kv_heads, head_dim, block;
    float eps;
};

template <class T> __device__ void normalise(float (&x)[PAIRS][2], const T *weight, int half, int lane, float eps) {
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        square += x[i][0] * x[i][0] + x[i][1] * x[i][1]; // zeros where the head ends
    const float by = rsqrtf(warp_sum(square) / static_cast<float>(2 * half) + eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int d = i * 32 + lane;
        if (d >= half)
            break;
        x[i][0] *= by * to_float(weight[d]);
        x[i][1] *= by * to_float(weight[d + half]);
    }
}

template <class T> __device__ void rotate(float (&x)[PAIRS][2], const T *cos, const T *sin, int half, int lane) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int d = i * 32 + lane;
        if (d >= half)
            break;
        const float low = x[i][0], high = x[i][1];
        x[i][0] = low * to_float(cos[d]) + high * to_float(sin[d]);
        x[i][1] = high * to_float(cos[d + half]) + low * to_float(sin[d + half]);
    }
}

// Element d goes to to[d * step].
template <class T> __device__ void store(const float (&x)[PAIRS][2], T *to, int step, int half, int lane) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int d = i * 32 + lane;
        if (d >= half)
            break;
        to[d * step] = from_float<T>(x[i][0]);
        to[(d + half) * step] = from_float<T>(x[i][1]);
    }
}

template <class T> __global__ void __launch_bounds__(WARPS * 32) rope_append(const __grid_constant__ Qkv<T> args) {
    const int lane = threadIdx.x % 32, head = blockIdx.y * WARPS + threadIdx.x / 32;
    if (head >= args.q_heads + 2 * args.kv_heads)
        return;
    const int64_t row = blockIdx.x;
    const int D = args.head_dim, half = D / 2;
    const T *from = args.qkv + row * args.qkv_stride + head * D;
    float x[PAIRS][2] = {};
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int d = i * 32 + lane;
        if (d >= half)
            break;
        x[i][0] = to_float(from[d]);
        x[i][1] = to_float(from[d + half]);
        if (args.bias != nullptr) {
            x[i][0] += to_float(args.bias[head * D + d]);
            x[i][1] += to_float(args.bias[head * D + d + half]);
        }
    }
    const bool is_q = head < args.q_heads, is_v = head >= args.q_heads + args.kv_heads;
    if (!is_v) {
        if (args.q_norm != nullptr)
            normalise(x, is_q ? args.q_norm : args.k_norm, half, lane, args.eps);
        rotate(x, args.cos + row * D, args.sin + row * D, half, lane);
    }
    if (is_q) {
        store(x, args.q_out + row * args.q_stride + head * D, 1, half, lane);
        return;
    }
    const int kv_head = head - args.q_heads - (is_v ? args.kv_heads : 0);
    T *const out = is_v ? args.v_out : args.k_out;
    if (out != nullptr)
        store(x, out + row * args.kv_stride + kv_head * D, 1, half, lane);
    const int slot = args.tables == nullptr ? -1 : args.slots[row];
    if (slot < 0)
        return;
    const int position = args.positions[row], block = args.block;
    const int64_t number = args.tables[slot * args.table_stride + position / block];
    T *const plane = args.cache + (number * args.kv_heads + kv_head) * 2 * D * block;
    if (is_v)
        store(x, plane + (block + position % block) * D, 1, half, lane);
    else
        store(x, plane + position % block, block, half, lane);
}

template <class T> void launch(const neo_cuda_qkv &args, cudaStream_t stream) {
    const auto elements = [](const void *p) { return static_cast<const T *>(p); };
    const auto writable = [](void *p) { return static_cast<T *>(p); };
    const neo_cuda_cache &cache = *args.cache;
    const Qkv<T> kernel{writable(cache.data),  elements(args.qkv),    elements(args.bias), elements(args.q_norm),
                        elements(args.k_norm), elements(args.cos),    elements(args.sin),  writable(args.q_out),
                        writable(args.k_out),  writable(args.v_out),  args.qkv_stride,     args.q_stride,
                        args.kv_stride,        args.table_stride,     args.block_tables,   args.slots,
                        args.positions,        args.q_heads,          cache.kv_heads,      cache.head_dim,
                        cache.block_size,      args.eps};
    const int heads = args.q_heads + 2 * cache.kv_heads;
    launch_kernel(rope_append<T>, dim3(args.rows, (heads + WARPS - 1) / WARPS), WARPS * 32, 0, stream, kernel);
}

neo_cuda_status check(const neo_cuda_qkv &args) noexcept {
    NEO_TRY(neo::check(args.cache));
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
