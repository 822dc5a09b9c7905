// A row's scale by its norm, where a product was taken of the row as it was; see neo_cuda_scale.
#pragma once

#include <ptx.cuh>

#include "check.h"

namespace neo {

// Blocks of THREADS threads, each with one row, which all of its threads help to sum: loads that no other waits for, so
// that those of what is to be scaled, asked for before, are under way meanwhile.
template <class T, int THREADS> struct Scale {
    static constexpr int WARPS = THREADS / 32;
    const T *hidden;
    int32_t width;
    float eps;

    explicit Scale(const neo_cuda_scale &args)
        : hidden(static_cast<const T *>(args.hidden)), width(args.width), eps(args.eps) {}

    // All threads call it.
    __device__ __forceinline__ float of(int64_t row, float *sums) const {
        if (hidden == nullptr)
            return 1.f;
        using V = Vec<T>;
        const V *const from = reinterpret_cast<const V *>(hidden + row * width);
        float square = 0.f;
#pragma unroll 2
        for (int i = threadIdx.x; i < width / V::N; i += THREADS) {
            const V x = from[i];
#pragma unroll
            for (int j = 0; j < V::N; j++)
                square += to_float(x.at[j]) * to_float(x.at[j]);
        }
        return rsqrtf(block_sum(square, sums) / static_cast<float>(width) + eps);
    }
};

inline neo_cuda_status check(const neo_cuda_scale &scale) noexcept {
    NEO_NEED(scale.hidden == nullptr || (scale.width > 0 && scale.width % 8 == 0),
             "scale.width is %d, must be a positive multiple of 8", scale.width);
    NEO_NEED(aligned(scale.hidden, 16), "scale.hidden must be aligned to 16 bytes");
    return NEO_CUDA_OK;
}

} // namespace neo
