// From a row of the fused projection to rotated q, k and v, and into the cache. A warp takes one head, of one row or of
// several, whose keys then go to the cache 16 bytes at a time where they are neighbours there.

#include <ptx.cuh>

#include "check.h"

namespace {

using namespace neo;

constexpr int WARPS = 8;
constexpr int MAX_HALF = 128;    // of a head
constexpr int MANY = 8;          // rows of a warp where there are enough of them; tokens of K in 16 bytes of 16-bit types
constexpr int ENOUGH_ROWS = 512;

template <class T> struct Qkv {
    T *cache;
    const T *qkv, *bias, *q_norm, *k_norm, *cos, *sin;
    T *q_out, *k_out, *v_out;
    int64_t qkv_stride, q_stride, kv_stride, table_stride;
    const int32_t *tables, *slots, *positions;
    int32_t rows, q_heads, kv_heads, head_dim, block;
    float eps;
};

template <class T, int V> struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Some {
    T at[V];
};

// Elements of a head that a lane has, V neighbours at a time: elements (32 i + lane) V and so on of each half.
template <class T, int V> struct Elements {
    static constexpr int PIECES = MAX_HALF / 32 / V;
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

// Bias, norm and rotation in fp32; rounded once.
template <class T, int V>
__device__ __forceinline__ void transform(Elements<T, V> &head, const T *bias, const T *norm, const T *cos, const T *sin,
                                          float eps, int half, int lane) {
    float x[Elements<T, V>::PIECES][2][V] = {}; // zeros where the head ends
    head.change(half, lane, [&](int i, int h, int j, int d) {
        x[i][h][j] = to_float(head.at[i][h].at[j]) + (bias != nullptr ? to_float(bias[d]) : 0.f);
    });
    if (norm != nullptr) {
        float square = 0.f;
        head.change(half, lane, [&](int i, int h, int j, int) { square += x[i][h][j] * x[i][h][j]; });
        const float by = rsqrtf(warp_sum(square) / static_cast<float>(2 * half) + eps);
        head.change(half, lane, [&](int i, int h, int j, int d) { x[i][h][j] *= by * to_float(norm[d]); });
    }
    Elements<T, V> c, s;
    if (cos != nullptr) {
        c.load(cos, half, lane);
        s.load(sin, half, lane);
    }
    head.change(half, lane, [&](int i, int h, int j, int) {
        const float rotated = cos == nullptr ? x[i][h][j]
                                             : x[i][h][j] * to_float(c.at[i][h].at[j]) +
                                                   x[i][1 - h][j] * to_float(s.at[i][h].at[j]);
        head.at[i][h].at[j] = from_float<T>(rotated);
    });
}

// Whether rows first, first + 1, ... are neighbours in the cache, from a whole 8 tokens on.
template <class T> __device__ bool neighbours(const Qkv<T> &args, int first) {
    bool are = args.slots[first] >= 0 && args.positions[first] % MANY == 0;
    for (int r = 1; r < MANY; r++)
        are = are && args.slots[first + r] == args.slots[first] && args.positions[first + r] == args.positions[first] + r;
    return are;
}

template <class T> __device__ T *plane_of(const Qkv<T> &args, int row, int kv_head) {
    const int64_t slot = args.slots[row];
    const int64_t number = args.tables[slot * args.table_stride + args.positions[row] / args.block];
    return args.cache + (number * args.kv_heads + kv_head) * 2 * args.head_dim * args.block;
}

template <class T, int ROWS, int V>
__device__ void append(const Qkv<T> &args, const Elements<T, V> (&of)[ROWS], int first, int rows, int kv_head, bool is_v,
                       int lane) {
    const int D = args.head_dim, half = D / 2, block = args.block;
    if constexpr (ROWS == MANY) {
        if (!is_v && rows == ROWS && neighbours(args, first)) {
            T *const to = plane_of(args, first, kv_head) + args.positions[first] % block;
            Elements<T, V>::each(half, lane, [&](int i, int h, int d) {
#pragma unroll
                for (int j = 0; j < V; j++) {
                    Some<T, ROWS> tokens;
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        tokens.at[r] = of[r].at[i][h].at[j];
                    *reinterpret_cast<Some<T, ROWS> *>(to + (d + j) * block) = tokens;
                }
            });
            return;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows || args.slots[first + r] < 0)
            continue;
        T *const plane = plane_of(args, first + r, kv_head);
        const int at = args.positions[first + r] % block;
        if (is_v)
            of[r].store(plane + (block + at) * D, half, lane);
        else
            of[r].store_apart(plane + at, block, half, lane);
    }
}

template <class T, int ROWS, int V>
__global__ void __launch_bounds__(WARPS * 32) rope_append(const __grid_constant__ Qkv<T> args) {
    const int lane = threadIdx.x % 32, head = blockIdx.y * WARPS + threadIdx.x / 32;
    if (head >= args.q_heads + 2 * args.kv_heads)
        return;
    const int first = blockIdx.x * ROWS, rows = min(ROWS, args.rows - first);
    const int D = args.head_dim, half = D / 2;
    const bool is_q = head < args.q_heads, is_v = head >= args.q_heads + args.kv_heads;
    Elements<T, V> of[ROWS]; // all are asked for before any is used
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r < rows)
            of[r].load(args.qkv + (first + r) * args.qkv_stride + head * D, half, lane);
    const T *const bias = args.bias == nullptr ? nullptr : args.bias + head * D;
    const T *const norm = is_v ? nullptr : is_q ? args.q_norm : args.k_norm;
    if (!is_v || bias != nullptr)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < rows) {
                const int64_t angles = int64_t{first + r} * D;
                transform(of[r], bias, norm, is_v ? nullptr : args.cos + angles, is_v ? nullptr : args.sin + angles,
                          args.eps, half, lane);
            }
    const int kv_head = head - args.q_heads - (is_v ? args.kv_heads : 0);
    T *const out = is_q ? args.q_out + head * D : is_v ? args.v_out : args.k_out;
    const int64_t stride = is_q ? args.q_stride : args.kv_stride;
    if (out != nullptr)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < rows)
                of[r].store(out + (first + r) * stride + (is_q ? 0 : kv_head * D), half, lane);
    if (!is_q && args.tables != nullptr)
        append<T, ROWS, V>(args, of, first, rows, kv_head, is_v, lane);
}

// Whether two neighbours can be taken at once everywhere.
bool in_pairs(const neo_cuda_qkv &args, size_t element) noexcept {
    const void *const pointers[] = {args.qkv, args.bias,  args.q_norm, args.k_norm, args.cos,
                                    args.sin, args.q_out, args.k_out,  args.v_out};
    for (const void *pointer : pointers) // NULL is aligned
        if (!aligned(pointer, 2 * element))
            return false;
    return args.qkv_stride % 2 == 0 && args.q_stride % 2 == 0 && args.kv_stride % 2 == 0;
}

template <class T> void launch(const neo_cuda_qkv &args, cudaStream_t stream) {
    const auto elements = [](const void *p) { return static_cast<const T *>(p); };
    const auto writable = [](void *p) { return static_cast<T *>(p); };
    const neo_cuda_cache &cache = *args.cache;
    const Qkv<T> kernel{writable(cache.data),  elements(args.qkv),    elements(args.bias), elements(args.q_norm),
                        elements(args.k_norm), elements(args.cos),    elements(args.sin),  writable(args.q_out),
                        writable(args.k_out),  writable(args.v_out),  args.qkv_stride,     args.q_stride,
                        args.kv_stride,        args.table_stride,     args.block_tables,   args.slots,
                        args.positions,        args.rows,             args.q_heads,        cache.kv_heads,
                        cache.head_dim,        cache.block_size,      args.eps};
    const int heads = args.q_heads + 2 * cache.kv_heads;
    const bool pairs = in_pairs(args, sizeof(T)), many = pairs && args.rows >= ENOUGH_ROWS;
    const auto take = many ? rope_append<T, MANY, 2> : pairs ? rope_append<T, 1, 2> : rope_append<T, 1, 1>;
    const int rows = many ? (args.rows + MANY - 1) / MANY : args.rows;
    launch_kernel(take, dim3(rows, (heads + WARPS - 1) / WARPS), WARPS * 32, 0, stream, kernel);
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
