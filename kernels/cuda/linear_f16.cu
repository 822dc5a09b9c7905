#include "linear.cuh"

cudaError_t neo::launch_linear_f16(const Linear &args, const LinearLaunch &how, cudaStream_t stream) noexcept {
    return launch_linear<half_t>(args, how, stream);
}
