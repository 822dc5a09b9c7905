#include "project.cuh"

cudaError_t neo::launch_project_f16(const Project &args, const ProjectLaunch &how, cudaStream_t stream) noexcept {
    return launch_project<half_t>(args, how, stream);
}
