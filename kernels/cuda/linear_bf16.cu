#include "linear.cuh"

cudaError_t neo::launch_linear_bf16(const Linear &args, const LinearLaunch &how, cudaStream_t stream) noexcept {
    return launch_linear<bf16_t>(args, how, stream);
}

// Of the largest blocks; smaller ones leave a multiprocessor to one block too, as far as there are others.
int neo::linear_clusters(int parts) noexcept {
    constexpr int BYTES = 2 * linear_stage_bytes(LINEAR_SPAN, LINEAR_ROWS);
    const auto kernel = linear<bf16_t, LINEAR_ROWS, false>;
    Device device{};
    if (current_device(device) != NEO_CUDA_OK || !knows_overlap(device.capability))
        return 0;
    const int bytes = device.shared_of_block / 2 > BYTES ? device.shared_of_block / 2 + 1024 : BYTES;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
        return 0;
    return clusters_at_once(kernel, static_cast<unsigned>(parts), LINEAR_THREADS, bytes);
}
