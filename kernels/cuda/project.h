// What the kernels that project rows share with the code that launches them.
#pragma once

#include <cuda_runtime_api.h>

#include "neo_cuda.h"

namespace neo {

constexpr int PROJECT_TILE = 16;    // rows of the weight in a tile (m of m16n8k16)
constexpr int PROJECT_STEP = 64;    // columns of the weight that are taken at once: a line of 128 bytes
constexpr int PROJECT_ROWS = 64;    // of x, at most
constexpr int PROJECT_THREADS = 256;
constexpr int PROJECT_WARP_TILES = 2;                      // tiles of a warp
constexpr int PROJECT_SPAN = 8 * PROJECT_WARP_TILES;        // tiles that a block takes at once, at most
constexpr int PROJECT_MAX_STAGES = 8;
constexpr int PROJECT_LINE_BYTES = PROJECT_STEP * 2;

struct Project {
    const void *x, *weight, *bias;
    void *out;
    int64_t x_stride, weight_stride, out_stride; // elements
    int32_t rows, width;                         // of x
    int32_t tiles, steps;                        // of the weight
    int32_t groups, parts;                       // blocks: groups of tiles times parts of the steps
    int32_t span, stages;                        // span: tiles that a block takes at once
};

// Bytes of shared memory: a stage of the ring, and a block's sums, which take the ring's place.
__host__ __device__ constexpr int project_stage_bytes(int span, int row_tile) {
    return (span * PROJECT_TILE + row_tile) * PROJECT_LINE_BYTES;
}
// Floats between the rows of sums: columns of a warp's fragments then lie in different banks.
__host__ __device__ constexpr int project_pitch(int span) { return span * PROJECT_TILE + 4; }
__host__ __device__ constexpr int project_sum_bytes(int span, int row_tile) { return row_tile * project_pitch(span) * 4; }

// How a launch is made: `row_tile` 8, 16, 32 or 64 rows, `halves`: two warps share tiles, each takes half of every step.
struct ProjectLaunch {
    int row_tile;
    bool halves;
    int bytes;
    bool overlapping;
};

// One for each type, in files of their own so that they build side by side.
cudaError_t launch_project_f16(const Project &args, const ProjectLaunch &how, cudaStream_t stream) noexcept;
cudaError_t launch_project_bf16(const Project &args, const ProjectLaunch &how, cudaStream_t stream) noexcept;
// Clusters of so many blocks that the device holds at once; 0 where it has none.
int project_clusters(int parts) noexcept;

} // namespace neo
