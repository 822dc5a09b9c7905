#include "project.cuh"

cudaError_t neo::launch_project_bf16(const Project &args, const ProjectLaunch &how, cudaStream_t stream) noexcept {
    return launch_project<bf16_t>(args, how, stream);
}

// Of the largest blocks; smaller ones leave a multiprocessor to one block too, as far as there are others.
int neo::project_clusters(int parts) noexcept {
    constexpr int BYTES = 2 * project_stage_bytes(PROJECT_SPAN, PROJECT_ROWS);
    const auto kernel = project<bf16_t, PROJECT_ROWS, false>;
    Device device{};
    if (current_device(device) != NEO_CUDA_OK || !knows_overlap(device.capability))
        return 0;
    const int bytes = device.shared_of_block / 2 > BYTES ? device.shared_of_block / 2 + 1024 : BYTES;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
        return 0;
    return clusters_at_once(kernel, static_cast<unsigned>(parts), PROJECT_THREADS, bytes);
}
