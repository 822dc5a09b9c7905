#include "attention_mma.cuh"

cudaError_t neo::launch_mma_bf16(const Attention &args, int n, int ctas, cudaStream_t stream) noexcept {
    return launch_mma<bf16_t>(args, n, ctas, stream);
}
