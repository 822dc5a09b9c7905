// Cosines and sines of a step's positions, once for all layers.

#include <ptx.cuh>

#include "check.h"

namespace {

using namespace neo;

constexpr int THREADS = 256;

template <class T> struct Angles {
    const int32_t *positions;
    const float *frequencies;
    T *cos, *sin;
    int32_t elements, head_dim; // elements: of all rows
    float scale;
};

// The functions of the library, not of the hardware: positions are many turns away from 0.
template <class T> __global__ void __launch_bounds__(THREADS) turn(const __grid_constant__ Angles<T> args) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= args.elements)
        return;
    const float angle = static_cast<float>(args.positions[i / args.head_dim]) * args.frequencies[i % args.head_dim];
    args.cos[i] = from_float<T>(cosf(angle) * args.scale);
    args.sin[i] = from_float<T>(sinf(angle) * args.scale);
}

template <class T> void launch(const neo_cuda_angles &args, cudaStream_t stream) {
    const Angles<T> kernel{args.positions,           args.frequencies,          static_cast<T *>(args.cos),
                           static_cast<T *>(args.sin), args.rows * args.head_dim, args.head_dim,
                           args.scale};
    launch_kernel(turn<T>, (kernel.elements + THREADS - 1) / THREADS, THREADS, 0, stream, kernel);
}

} // namespace

extern "C" neo_cuda_status neo_cuda_rope_angles(const neo_cuda_angles *args, void *stream) {
    clear_error();
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check_dtype(args->dtype));
    NEO_NEED(args->rows >= 0, "rows is %d, must not be negative", args->rows);
    NEO_NEED(args->head_dim > 0 && args->head_dim <= 256 && args->head_dim % 2 == 0,
             "head_dim is %d, must be even, up to 256", args->head_dim);
    NEO_NEED(args->rows <= INT32_MAX / args->head_dim, "rows is %d: too many", args->rows);
    if (args->rows == 0)
        return NEO_CUDA_OK;
    NEO_NEED(args->positions != nullptr && args->frequencies != nullptr, "positions and frequencies must not be NULL");
    NEO_NEED(args->cos != nullptr && args->sin != nullptr, "cos and sin must not be NULL");
    const auto on = static_cast<cudaStream_t>(stream);
    if (args->dtype == NEO_CUDA_FP32)
        launch<float>(*args, on);
    else if (args->dtype == NEO_CUDA_FP16)
        launch<half_t>(*args, on);
    else
        launch<bf16_t>(*args, on);
    return launched("angles of positions");
}
