// What the kernels of decode attention share with the code that launches them.
#pragma once

#include <cuda_runtime_api.h>

#include "neo_cuda.h"

namespace neo {

constexpr int TILE = 16;           // tokens that a warp takes at once
constexpr int HEADS_OF_MMA = 8;    // query heads in the n of m16n8k16
constexpr int WARPS_OF_CTA = 4;
constexpr int MAX_STAGES = 8;

// Rows, units of a row (KV heads, cut where more than heads_of_unit query heads share one) and tiles of a unit follow
// each other in one line that the workers (warps) cut into equal runs. The places of a unit in that line are UNIT_COST
// for beginning and ending it, which takes a worker about as long as so many tiles, and then one for each tile.
constexpr int UNIT_COST = 3;
constexpr int SHORTEST_RUN = 4; // below that, merging costs more than another warp gains
static_assert(SHORTEST_RUN > UNIT_COST, "a run has a tile");

// Where a worker's run begins: at which place of which unit, and the row's tokens; 0 of them: it has no run.
struct alignas(16) Start {
    int32_t row, unit, offset, length;
};

// Parts of a unit that are merged at once; where there are more, groups of so many first.
constexpr int GROUP = 16;

struct Plan {
    int32_t *run;        // [4]: places in a worker's run, all places
    Start *starts;       // [workers]
    int32_t *begins;     // [rows]: the place at which a row begins
    int32_t *arrived;    // [rows * units]: parts or groups of a unit that are done; 0 between calls
    int32_t *grouped;    // [2 * workers]: parts of the group that begins with this one that are done; likewise
    float2 *max_and_sum; // [2 * workers][heads_of_unit]: of partial results; the maximum in units of log2
    float *sum_v;        // [2 * workers][heads_of_unit][head_dim]
};

struct Attention {
    const void *cache, *q;
    void *out;
    int64_t q_stride, q_head_stride, out_stride, out_head_stride; // elements
    int64_t block_stride, head_stride;                            // elements of the cache
    const int32_t *tables, *slots, *lengths;
    int64_t table_stride;
    Plan plan;
    int32_t rows, q_heads, kv_heads, group; // group: query heads per KV head
    int32_t units, cuts;                    // units of a row; of a KV head
    int32_t head_dim, block_shift;          // log2 of the block size
    int32_t workers, stages;
    float scale_log2; // scale * log2(e)
    int32_t early;    // see neo_cuda_decode
    int32_t release;  // whether the next kernel may begin while this one runs, as far as its own wait
};

// Bytes of shared memory: a row of V, padded unless it is whole lines of 128 bytes, and one tile of one warp.
constexpr int v_row_bytes(int head_dim) { return 2 * head_dim + (head_dim % 64 == 0 ? 0 : 16); }
constexpr int tile_bytes(int head_dim) { return 2 * TILE * head_dim + TILE * v_row_bytes(head_dim); }
template <int D> constexpr int TILE_BYTES = tile_bytes(D); // for device code

// n tiles of 8 query heads each. One kernel for each type, in files of their own so that they build side by side.
cudaError_t launch_mma_f16(const Attention &args, int n, int ctas, cudaStream_t stream) noexcept;
cudaError_t launch_mma_bf16(const Attention &args, int n, int ctas, cudaStream_t stream) noexcept;
cudaError_t launch_plain(const Attention &args, int dtype, cudaStream_t stream) noexcept;

} // namespace neo
