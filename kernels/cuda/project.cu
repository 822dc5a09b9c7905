// The projection of few rows: arguments, and how its work is cut.

#include <algorithm>
#include <array>
#include <atomic>

#include <ptx.cuh>

#include "check.h"
#include "device.h"
#include "project.h"

namespace {

using namespace neo;

constexpr int MAX_PARTS = 8; // of k: blocks in a cluster that any device takes
constexpr int LEAST_STAGES = 3;

// What the choice of a cut reckons with, ns and bytes per ns: measured on an H200, right for others as far as ratios go.
constexpr double MEMORY_RATE = 4200, BLOCK_RATE = 50, STEP_NS = 150, MERGE_NS = 600, MERGE_RATE = 25;

int row_tile_of(int rows) noexcept { return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

// Asked for once for each device; 0: none.
int clusters(const Device &device, int parts) noexcept {
    static std::array<std::array<std::atomic<int>, MAX_PARTS + 1>, 64> known; // one more than the answer; 0: not asked
    std::atomic<int> &entry = known[device.index][parts];
    if (entry.load(std::memory_order_relaxed) == 0)
        entry.store(project_clusters(parts) + 1, std::memory_order_relaxed);
    return entry.load(std::memory_order_relaxed) - 1;
}

struct Cut {
    int parts = 0, groups = 0, span = 0; // parts 0: this device cannot do it
    bool halves = false;
    double ns = 0; // about
};

Cut cut_into(const Device &device, const neo_cuda_project &args, int parts) noexcept {
    const int tiles = args.columns / PROJECT_TILE, steps = (args.width + PROJECT_STEP - 1) / PROJECT_STEP;
    const int row_tile = row_tile_of(args.rows);
    const int groups = std::min(tiles, parts == 1 ? device.multiprocessors : clusters(device, parts));
    const int lines = device.shared_of_block / LEAST_STAGES / PROJECT_LINE_BYTES;
    const int most = std::min(PROJECT_SPAN, (lines - row_tile) / PROJECT_TILE / PROJECT_WARP_TILES * PROJECT_WARP_TILES);
    if (parts > steps || groups <= 0 || most <= 0)
        return {};
    const int count = (tiles + groups - 1) / groups, rounds = (count + most - 1) / most;
    if (parts > 1 && rounds > 1)
        return {};
    const int even = PROJECT_WARP_TILES;
    Cut cut{parts, groups, ((count + rounds - 1) / rounds + even - 1) / even * even, false, 0};
    cut.halves = rounds == 1 && cut.span <= PROJECT_SPAN / 2;
    const double step = std::max(project_stage_bytes(cut.span, row_tile) / BLOCK_RATE, STEP_NS);
    const double read = static_cast<double>(args.columns) * args.width * 2 / MEMORY_RATE;
    cut.ns = std::max(read, step * rounds * ((steps + parts - 1) / parts));
    if (parts > 1)
        cut.ns += MERGE_NS + project_sum_bytes(cut.span, row_tile) / MERGE_RATE;
    return cut;
}

Cut best_cut(const Device &device, const neo_cuda_project &args) noexcept {
    if (args.parts != 0)
        return cut_into(device, args, args.parts);
    Cut best{};
    for (int parts = 1; parts <= MAX_PARTS; parts *= 2) {
        const Cut cut = cut_into(device, args, parts);
        if (cut.parts != 0 && (best.parts == 0 || cut.ns < best.ns))
            best = cut;
    }
    return best;
}

neo_cuda_status check_project(const neo_cuda_project &args) noexcept {
    NEO_NEED(args.dtype == NEO_CUDA_FP16 || args.dtype == NEO_CUDA_BF16, "dtype is %d, must be 1 (fp16) or 2 (bf16)",
             args.dtype);
    NEO_NEED(args.rows >= 0 && args.rows <= PROJECT_ROWS, "rows is %d, must be 0 to %d", args.rows, PROJECT_ROWS);
    NEO_NEED(args.columns > 0 && args.columns % PROJECT_TILE == 0, "columns is %d, must be a positive multiple of %d",
             args.columns, PROJECT_TILE);
    NEO_NEED(args.width > 0 && args.width % 8 == 0, "width is %d, must be a positive multiple of 8", args.width);
    NEO_NEED(args.parts == 0 || args.parts == 1 || args.parts == 2 || args.parts == 4 || args.parts == 8,
             "parts is %d, must be 0, 1, 2, 4 or 8", args.parts);
    NEO_NEED(args.stages == 0 || (args.stages >= 2 && args.stages <= PROJECT_MAX_STAGES),
             "stages is %d, must be 0 or 2 to %d", args.stages, PROJECT_MAX_STAGES);
    if (args.rows == 0)
        return NEO_CUDA_OK;
    NEO_NEED(args.x != nullptr && args.weight != nullptr && args.out != nullptr, "x, weight and out must not be NULL");
    NEO_NEED(aligned(args.x, 16) && aligned(args.weight, 16), "x and weight must be aligned to 16 bytes");
    NEO_NEED(aligned(args.out, 8), "out must be aligned to 8 bytes");
    NEO_NEED(args.x_stride >= args.width && args.x_stride % 8 == 0,
             "x_stride is %lld, must be a multiple of 8, at least width", static_cast<long long>(args.x_stride));
    NEO_NEED(args.weight_stride >= args.width && args.weight_stride % 8 == 0,
             "weight_stride is %lld, must be a multiple of 8, at least width", static_cast<long long>(args.weight_stride));
    NEO_NEED(args.out_stride >= args.columns && args.out_stride % 4 == 0,
             "out_stride is %lld, must be a multiple of 4, at least columns", static_cast<long long>(args.out_stride));
    return NEO_CUDA_OK;
}

} // namespace

extern "C" neo_cuda_status neo_cuda_project_rows(const neo_cuda_project *args, void *stream) {
    clear_error();
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check_project(*args));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    Device device{};
    NEO_TRY(current_device(device));
    if (device.capability < 80)
        return fail(NEO_CUDA_UNSUPPORTED, "projecting rows needs compute capability 8.0, the device has %d.%d",
                    device.capability / 10, device.capability % 10);
    const Cut cut = best_cut(device, *args);
    const int row_tile = row_tile_of(args->rows);
    if (cut.parts == 0)
        return fail(NEO_CUDA_UNSUPPORTED, "%d columns of width %d cannot be cut into %d parts on this device",
                    args->columns, args->width, args->parts);
    const int stage = project_stage_bytes(cut.span, row_tile);
    int stages = std::min(PROJECT_MAX_STAGES, device.shared_of_block / stage);
    if (args->stages != 0)
        stages = std::min(stages, args->stages);
    Project project{};
    project.x = args->x;
    project.weight = args->weight;
    project.bias = args->bias;
    project.out = args->out;
    project.x_stride = args->x_stride;
    project.weight_stride = args->weight_stride;
    project.out_stride = args->out_stride;
    project.rows = args->rows;
    project.width = args->width;
    project.tiles = args->columns / PROJECT_TILE;
    project.steps = (args->width + PROJECT_STEP - 1) / PROJECT_STEP;
    project.groups = cut.groups;
    project.parts = cut.parts;
    project.span = cut.span;
    project.stages = stages;
    const int sums = cut.parts > 1 || cut.halves ? project_sum_bytes(cut.span, row_tile) : 0;
    const ProjectLaunch how{row_tile, cut.halves, std::max(stages * stage, sums), overlaps(device)};
    const auto launch = args->dtype == NEO_CUDA_FP16 ? launch_project_f16 : launch_project_bf16;
    return from_cuda(launch(project, how, static_cast<cudaStream_t>(stream)), "projecting rows");
}
