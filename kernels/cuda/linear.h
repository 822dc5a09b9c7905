// What the kernels of the linear layer share with the code that launches them.
#pragma once

#include <cuda_runtime_api.h>

#include "neo_cuda.h"

namespace neo {

constexpr int LINEAR_TILE = 16;    // rows of the weight in a tile (m of m16n8k16)
constexpr int LINEAR_STEP = 64;    // columns of the weight that are taken at once: a line of 128 bytes
constexpr int LINEAR_ROWS = 64;    // of x, at most
constexpr int LINEAR_THREADS = 256;
constexpr int LINEAR_WARP_TILES = 2;                      // tiles of a warp
constexpr int LINEAR_SPAN = 8 * LINEAR_WARP_TILES;        // tiles that a block takes at once, at most
constexpr int LINEAR_MAX_STAGES = 8;
constexpr int LINEAR_LINE_BYTES = LINEAR_STEP * 2;

struct Linear {
    const void *x, *weight, *bias;
    void *out;
    int64_t x_stride, weight_stride, out_stride; // elements
    int32_t rows, width;                         // of x
    int32_t tiles, steps;                        // of the weight
    int32_t groups, parts;                       // blocks: groups of tiles times parts of the steps
    int32_t span, stages;                        // span: tiles that a block takes at once
};

// Bytes of shared memory: a stage of the ring, and a block's sums, which take the ring's place.
__host__ __device__ constexpr int linear_stage_bytes(int span, int row_tile) {
    return (span * LINEAR_TILE + row_tile) * LINEAR_LINE_BYTES;
}
// Floats between the rows of sums: columns of a warp's fragments then lie in different banks.
__host__ __device__ constexpr int linear_pitch(int span) { return span * LINEAR_TILE + 4; }
__host__ __device__ constexpr int linear_sum_bytes(int span, int row_tile) { return row_tile * linear_pitch(span) * 4; }

// How a launch is made: `row_tile` 8, 16, 32 or 64 rows, `halves`: two warps share tiles, each takes half of every step.
struct LinearLaunch {
    int row_tile;
    bool halves;
    int bytes;
    bool overlapping;
};

// One for each type, in files of their own so that they build side by side.
cudaError_t launch_linear_f16(const Linear &args, const LinearLaunch &how, cudaStream_t stream) noexcept;
cudaError_t launch_linear_bf16(const Linear &args, const LinearLaunch &how, cudaStream_t stream) noexcept;
// Clusters of so many blocks that the device holds at once; 0 where it has none.
int linear_clusters(int parts) noexcept;

} // namespace neo
