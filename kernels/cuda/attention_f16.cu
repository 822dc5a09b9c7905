#include "attention_mma.cuh"

cudaError_t neo::launch_mma_f16(const Attention &args, int n, int ctas, cudaStream_t stream) noexcept {
    return launch_mma<half_t>(args, n, ctas, stream);
}
