#include "kernels.h"

#include <cstring>

bool neo::supported() noexcept {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return true;
#endif
}

void neo::load(int32_t dtype, const void *from, float *to, int32_t n, float factor) noexcept {
    if (dtype == NEO_CPU_FP16)
        neo_load_f16(from, to, n, factor);
    else if (dtype == NEO_CPU_BF16)
        neo_load_bf16(from, to, n, factor);
    else
        neo_load_f32(from, to, n, factor);
}

void neo::store(int32_t dtype, const float *from, void *to, int32_t n) noexcept {
    if (dtype == NEO_CPU_FP16)
        neo_store_f16(from, to, n);
    else if (dtype == NEO_CPU_BF16)
        neo_store_bf16(from, to, n);
    else
        std::memcpy(to, from, sizeof(float) * n);
}

extern "C" {

int32_t neo_cpu_abi(void) { return NEO_CPU_ABI; }

const char *neo_cpu_version(void) { return "3.0.0"; }

const char *neo_cpu_target(void) {
    if (!neo::supported())
        return "unsupported";
#if defined(__x86_64__)
    return neo_lanes() == 16 ? "avx512" : "avx2";
#else
    return "neon";
#endif
}

} // extern "C"
