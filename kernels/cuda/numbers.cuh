// The three element types, and 16 bytes of them at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace neo {

using half_t = __half;
using bf16_t = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16_t x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ half_t from_float<half_t>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16_t from_float<bf16_t>(float x) { return __float2bfloat16_rn(x); }

// Two neighbours in one register, the first one low.
template <class Pair> __device__ __forceinline__ uint32_t bits_of(const Pair &pair) {
    static_assert(sizeof(Pair) == 4, "two elements of 16 bits");
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}
__device__ __forceinline__ uint32_t pack(float low, float high, half_t) {
    return bits_of(__floats2half2_rn(low, high));
}
__device__ __forceinline__ uint32_t pack(float low, float high, bf16_t) {
    return bits_of(__floats2bfloat162_rn(low, high));
}

__device__ __forceinline__ float2 unpack(uint32_t pair, half_t) {
    half_t both[2];
    memcpy(both, &pair, sizeof(pair));
    return make_float2(to_float(both[0]), to_float(both[1]));
}
// Bits of bf16 are the upper ones of a float: no register of 16 bits is needed on the way.
__device__ __forceinline__ float2 unpack(uint32_t pair, bf16_t) {
    const uint32_t bits[2] = {pair << 16, pair & 0xffff0000u};
    float both[2];
    memcpy(both, bits, sizeof(bits));
    return make_float2(both[0], both[1]);
}

// 16 bytes of elements.
template <class T> struct alignas(16) Vec {
    static constexpr int N = 16 / sizeof(T);
    T at[N];
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// Sum over the block of whole warps; `sums` has a place for each. All threads call it.
__device__ __forceinline__ float block_sum(float x, float *sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0)
        sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? sums[lane] : 0.f);
}

} // namespace neo
