// What is written in PTX or in CUDA's own syntax: tensor cores, copies into shared memory, numbers that the host reads,
// launches. The emulator has a file of the same name.
#pragma once

#include <cuda_runtime_api.h>

#include "../device.h"
#include "../numbers.cuh"

namespace neo {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros unless `valid`. Asynchronous from sm_80 on.
__device__ __forceinline__ void copy_16(uint32_t to, const void *from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    uint4 word = make_uint4(0, 0, 0, 0);
    if (valid)
        word = __ldg(static_cast<const uint4 *>(from));
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
                 : "memory");
#endif
}

__device__ __forceinline__ void end_group() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `pending` groups of this thread are under way.
__device__ __forceinline__ void await_groups(int pending) {
#if __CUDA_ARCH__ >= 800
    switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
    }
#endif
}

// Four 8x8 matrices, each transposed on the way: lanes 8i to 8i+7 give the addresses of the rows of the i-th.
__device__ __forceinline__ void load_transposed(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

// An 8x8 matrix that a warp holds, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t a) {
    uint32_t b;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
    return b;
}

// c[16][8] += a[16][16] b[16][8]
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half_t) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16_t) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap(); // sm_75 has none: such caches take the plain kernel there
#endif
}

// To the compiler these may be other numbers from here on: it keeps in no registers what it has computed of them.
__device__ __forceinline__ void stay_packed(uint32_t (&words)[4]) {
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
}

// ---- numbers that device and host both see ----

__device__ __forceinline__ uint32_t load_acquire(const uint32_t *flag) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(uint32_t *flag, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t now_ns() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

// ---- beginning before the kernel ahead on the stream has ended ----

// Until all kernels ahead on the stream have ended and what they wrote is to be seen. Every thread block calls it, those
// too that have nothing to do: a kernel that ends must not be ahead of the one that it did not wait for.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every block has called it, the next kernel may begin, as far as its own await_previous().
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- launches ----

template <class... Parameters, class... Args>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Args &...args) {
    kernel<<<grid, threads, shared_bytes, stream>>>(args...);
}

// Whether the code that a device of this capability runs, of what this library holds, knows await_previous(). Of older
// code compiled for a newer device that is not so.
inline bool knows_overlap(int capability) noexcept {
    constexpr int built[] = {__CUDA_ARCH_LIST__};
    for (const int arch : built)
        if (arch >= 900 && arch <= 10 * capability)
            return true;
    return false;
}

// Of a kernel that calls await_previous() before it reads what others may have just written, and before it writes. It
// and the one ahead share multiprocessors only where both have these divided alike between L1 and shared memory.
template <class... Parameters, class... Args>
void launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                        const Args &...args) {
    Device device{};
    if (!overlap_wanted() || current_device(device) != NEO_CUDA_OK || !knows_overlap(device.capability)) {
        launch_kernel(kernel, grid, threads, shared_bytes, stream, args...);
        return;
    }
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, args...); // its error is the last one, for the caller to ask for
}

} // namespace neo

// Shared memory whose size the launch gives.
#define NEO_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]
