// CUDA for the emulator: what the kernels of this folder use of the language and of its runtime, on the CPU.
//
// A thread of the device is a fiber; blocks run one after the other, fibers of a block in turn, each until it must wait
// for others. Copies into shared memory happen when they are waited for, not when they are asked for, so that a missing
// wait shows. It finds wrong indices, masks and merges on any machine; races and speed it cannot show.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static // blocks run one after the other

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Place {
    dim3 thread, block, of_block, of_grid;
};
extern Place place; // of the fiber that runs

void sync_block();
void sync_warp();
// Every lane gives 16 bytes and sees those of all 32; valid until the lane's next exchange but one.
using Lanes = const char (*)[16];
Lanes exchange(const void *mine, size_t bytes);
// `overlapping`: the kernel may begin before the one ahead has ended, so every thread must wait for that one, once at least.
void run(dim3 grid, unsigned threads, size_t shared_bytes, bool overlapping, const std::function<void()> &kernel);
void await_previous();
char *dynamic_shared();
// Copies that have been asked for, by this fiber.
void ask_copy(void *to, const void *from, bool valid);
void end_group();
void await_groups(int pending);

template <class T> T from_lane(Lanes lanes, int lane) {
    T value;
    std::memcpy(&value, lanes[lane], sizeof(T));
    return value;
}

} // namespace emulator

#define threadIdx (::emulator::place.thread)
#define blockIdx (::emulator::place.block)
#define blockDim (::emulator::place.of_block)
#define gridDim (::emulator::place.of_grid)

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp() { emulator::sync_warp(); }
inline void __threadfence() {}
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) {}
template <class T> T __shfl_sync(unsigned, T x, int lane) {
    return emulator::from_lane<T>(emulator::exchange(&x, sizeof(T)), lane & 31);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulator::from_lane<T>(emulator::exchange(&x, sizeof(T)), (threadIdx.x ^ mask) & 31);
}
template <class T> T __shfl_up_sync(unsigned, T x, int by) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return emulator::from_lane<T>(emulator::exchange(&x, sizeof(T)), lane < by ? lane : lane - by);
}
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldcv(const T *p) { return *p; }
template <class T> void __stcs(T *p, T x) { *p = x; }
template <class T> T atomicAdd(T *p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- the runtime: one device, which is always there ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrL2CacheSize
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDefault };
using cudaStream_t = struct CUstream_st *;

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
inline const char *cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue"; }
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
