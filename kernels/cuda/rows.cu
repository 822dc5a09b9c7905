// What stands between the matrix products: residual and norm, SiLU and product.

#include <ptx.cuh>

#include "check.h"
#include "device.h"
#include "scale.cuh"

namespace {

using namespace neo;

constexpr int NORM_CHUNKS = 4;    // of 16 bytes that a thread keeps of its row
constexpr int NORM_THREADS = 1024; // at most
constexpr int SILU_THREADS = 256;

// One block a row, which it keeps in registers between the two passes.
template <class T>
__global__ void __launch_bounds__(NORM_THREADS)
    add_rms_norm(T *hidden, const T *delta, const T *weight, T *out, int width, float eps, int release) {
    using V = Vec<T>;
    __shared__ float sums[32];
    const V *const weights = reinterpret_cast<const V *>(weight);
    V weight_first; // of a row of usual width all; of others' rest there are no registers
    if (static_cast<int>(threadIdx.x) < width / V::N)
        weight_first = weights[threadIdx.x];
    await_previous();
    if (release != 0)
        release_next();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * width;
    const int chunks = width / V::N;
    V kept[NORM_CHUNKS];
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < NORM_CHUNKS; i++) {
        const int chunk = i * blockDim.x + threadIdx.x;
        if (chunk >= chunks)
            break;
        V x = reinterpret_cast<const V *>(hidden + first)[chunk];
        if (delta != nullptr) {
            const V y = reinterpret_cast<const V *>(delta + first)[chunk];
#pragma unroll
            for (int j = 0; j < V::N; j++)
                x.at[j] = from_float<T>(to_float(x.at[j]) + to_float(y.at[j]));
            reinterpret_cast<V *>(hidden + first)[chunk] = x;
        }
#pragma unroll
        for (int j = 0; j < V::N; j++)
            square += to_float(x.at[j]) * to_float(x.at[j]);
        kept[i] = x;
    }
    const float by = rsqrtf(block_sum(square, sums) / static_cast<float>(width) + eps);
#pragma unroll
    for (int i = 0; i < NORM_CHUNKS; i++) {
        const int chunk = i * blockDim.x + threadIdx.x;
        if (chunk >= chunks)
            break;
        const V w = i == 0 ? weight_first : weights[chunk];
        V y;
#pragma unroll
        for (int j = 0; j < V::N; j++)
            y.at[j] = from_float<T>(to_float(kept[i].at[j]) * by * to_float(w.at[j]));
        reinterpret_cast<V *>(out + first)[chunk] = y;
    }
}

// fp32 serves exact comparisons: the exponential is then taken to the last bits.
template <class T> __device__ float exponential(float x) { return __expf(x); }
template <> __device__ float exponential<float>(float x) { return expf(x); }

template <class T>
__global__ void __launch_bounds__(SILU_THREADS)
    silu_mul(const T *gate_up, T *out, int width, Scale<T, SILU_THREADS> scale, int release) {
    using V = Vec<T>;
    __shared__ float sums[SILU_THREADS / 32];
    await_previous();
    if (release != 0)
        release_next();
    const int chunk = blockIdx.y * SILU_THREADS + threadIdx.x;
    const bool there = chunk < width / V::N;
    const T *row = gate_up + static_cast<int64_t>(blockIdx.x) * 2 * width;
    V gate, up;
    if (there) {
        gate = reinterpret_cast<const V *>(row)[chunk];
        up = reinterpret_cast<const V *>(row + width)[chunk];
    }
    const float by = scale.of(blockIdx.x, sums);
    if (!there)
        return;
    V y;
#pragma unroll
    for (int j = 0; j < V::N; j++) {
        const float x = to_float(gate.at[j]) * by;
        y.at[j] = from_float<T>(x / (1.f + exponential<T>(-x)) * (to_float(up.at[j]) * by));
    }
    reinterpret_cast<V *>(out + static_cast<int64_t>(blockIdx.x) * width)[chunk] = y;
}

neo_cuda_status check_width(int32_t rows, int32_t width, int32_t dtype) noexcept {
    NEO_TRY(check_dtype(dtype));
    NEO_NEED(rows >= 0, "rows is %d, must not be negative", rows);
    NEO_NEED(width > 0 && width % 8 == 0, "width is %d, must be a positive multiple of 8", width);
    return NEO_CUDA_OK;
}

template <class T> void launch(const neo_cuda_norm &args, cudaStream_t stream) {
    const int chunks = args.width / Vec<T>::N;
    int threads = (chunks + 31) / 32 * 32;
    threads = threads > NORM_THREADS ? NORM_THREADS : threads;
    launch_overlapping(add_rms_norm<T>, args.rows, threads, 0, stream, static_cast<T *>(args.hidden),
                       static_cast<const T *>(args.delta), static_cast<const T *>(args.weight),
                       static_cast<T *>(args.out), args.width, args.eps, release_wanted() ? 1 : 0);
}

template <class T> void launch(const neo_cuda_silu &args, cudaStream_t stream) {
    const unsigned chunks = args.width / Vec<T>::N;
    const dim3 grid(args.rows, (chunks + SILU_THREADS - 1) / SILU_THREADS);
    launch_overlapping(silu_mul<T>, grid, SILU_THREADS, 0, stream, static_cast<const T *>(args.gate_up),
                       static_cast<T *>(args.out), args.width, Scale<T, SILU_THREADS>(args.scale),
                       release_wanted() ? 1 : 0);
}

template <class Args> void launch_as(const Args &args, int32_t dtype, void *stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (dtype == NEO_CUDA_FP32)
        launch<float>(args, on);
    else if (dtype == NEO_CUDA_FP16)
        launch<half_t>(args, on);
    else
        launch<bf16_t>(args, on);
}

} // namespace

extern "C" neo_cuda_status neo_cuda_add_rms_norm(const neo_cuda_norm *args, void *stream) {
    clear_error();
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check_width(args->rows, args->width, args->dtype));
    const int64_t most = NORM_THREADS * NORM_CHUNKS * (16 / bytes_of(args->dtype));
    NEO_NEED(args->width <= most, "width is %d, must be at most %lld", args->width, static_cast<long long>(most));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    NEO_NEED(args->hidden != nullptr && args->weight != nullptr && args->out != nullptr,
             "hidden, weight and out must not be NULL");
    NEO_NEED(aligned(args->hidden, 16) && aligned(args->delta, 16) && aligned(args->weight, 16) && aligned(args->out, 16),
             "hidden, delta, weight and out must be aligned to 16 bytes");
    launch_as(*args, args->dtype, stream);
    return launched("residual and norm");
}

extern "C" neo_cuda_status neo_cuda_silu_mul(const neo_cuda_silu *args, void *stream) {
    clear_error();
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check_width(args->rows, args->width, args->dtype));
    NEO_TRY(neo::check(args->scale));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    NEO_NEED(args->gate_up != nullptr && args->out != nullptr, "gate_up and out must not be NULL");
    NEO_NEED(aligned(args->gate_up, 16) && aligned(args->out, 16), "gate_up and out must be aligned to 16 bytes");
    launch_as(*args, args->dtype, stream);
    return launched("SiLU and product");
}
