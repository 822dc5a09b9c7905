// Blocks from one memory to another, either of which may be pinned host memory that the device reaches over its bus.

#include <algorithm>
#include <vector>

#include <ptx.cuh>

#include "check.h"

namespace {

using namespace neo;

constexpr int THREADS = 256;
constexpr int AHEAD = 8; // loads of 16 bytes that a thread has under way: a bus takes a microsecond to answer
constexpr int PIECE = THREADS * AHEAD * 16; // bytes that a block of threads copies at once
constexpr int CTAS = 16;

struct Copy {
    const char *src;
    char *dst;
    int64_t block_bytes;
    const int32_t *src_blocks, *dst_blocks, *count_at;
    int32_t count, pieces; // pieces: of a block
};

// Pieces of all blocks are dealt out in turn, so that a bus sees long runs.
__global__ void __launch_bounds__(THREADS) copy_blocks(const __grid_constant__ Copy args) {
    int count = args.count;
    if (args.count_at != nullptr)
        count = max(0, min(count, *static_cast<const volatile int32_t *>(args.count_at)));
    const int64_t all = static_cast<int64_t>(count) * args.pieces;
    for (int64_t piece = blockIdx.x; piece < all; piece += gridDim.x) {
        const int64_t pair = piece / args.pieces, first = piece % args.pieces * PIECE;
        const char *from = args.src + __ldcv(args.src_blocks + pair) * args.block_bytes;
        char *to = args.dst + __ldcv(args.dst_blocks + pair) * args.block_bytes;
        uint4 words[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t at = first + (i * THREADS + threadIdx.x) * 16;
            if (at < args.block_bytes) // read afresh: the host may have written since a kernel last looked
                words[i] = __ldcv(reinterpret_cast<const uint4 *>(from + at));
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t at = first + (i * THREADS + threadIdx.x) * 16;
            if (at < args.block_bytes)
                __stcs(reinterpret_cast<uint4 *>(to + at), words[i]);
        }
    }
}

neo_cuda_status check(const neo_cuda_copy *args) noexcept {
    NEO_NEED_SIZE(args, "args");
    NEO_NEED(args->count >= 0, "count is %d, must not be negative", args->count);
    NEO_NEED(args->ctas >= 0 && args->ctas <= 65535, "ctas is %d, must be 0 to 65535", args->ctas);
    NEO_NEED(args->block_bytes > 0 && args->block_bytes % 16 == 0, "block_bytes is %lld, must be a positive multiple of 16",
             static_cast<long long>(args->block_bytes));
    if (args->count == 0)
        return NEO_CUDA_OK;
    NEO_NEED(args->src != nullptr && args->dst != nullptr, "src and dst must not be NULL");
    NEO_NEED(aligned(args->src, 16) && aligned(args->dst, 16), "src and dst must be aligned to 16 bytes");
    NEO_NEED(args->src_blocks != nullptr && args->dst_blocks != nullptr, "src_blocks and dst_blocks must not be NULL");
    return NEO_CUDA_OK;
}

// Neighbours among the pairs, each one copy.
struct Runs {
    std::vector<void *> to;
    std::vector<const void *> from;
    std::vector<size_t> bytes;

    explicit Runs(const neo_cuda_copy &args) {
        const int32_t *src = args.src_blocks, *dst = args.dst_blocks;
        for (int32_t begin = 0, end = 0; begin < args.count; begin = end) {
            for (end = begin + 1; end < args.count && src[end] == src[end - 1] + 1 && dst[end] == dst[end - 1] + 1;)
                end++;
            to.push_back(static_cast<char *>(args.dst) + dst[begin] * args.block_bytes);
            from.push_back(static_cast<const char *>(args.src) + src[begin] * args.block_bytes);
            bytes.push_back(static_cast<size_t>(end - begin) * args.block_bytes);
        }
    }

    // In one call, where the runtime and the driver have one: it costs the processor a fraction of many.
    cudaError_t copy(cudaStream_t stream) const {
#if CUDART_VERSION >= 13000
        if (bytes.size() > 1 && stream != nullptr) {
            cudaMemcpyAttributes how{};
            how.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
            how.flags = cudaMemcpyFlagPreferOverlapWithCompute;
            size_t first = 0;
            const cudaError_t status =
                cudaMemcpyBatchAsync(to.data(), from.data(), bytes.data(), bytes.size(), &how, &first, 1, stream);
            if (status != cudaErrorNotSupported && status != cudaErrorCallRequiresNewerDriver)
                return status;
            cudaGetLastError(); // or the next launch, ours or torch's, would take it for its own
        }
#endif
        return one_by_one(stream);
    }

    cudaError_t one_by_one(cudaStream_t stream) const {
        cudaError_t status = cudaSuccess;
        for (size_t i = 0; i < bytes.size() && status == cudaSuccess; i++)
            status = cudaMemcpyAsync(to[i], from[i], bytes[i], cudaMemcpyDefault, stream);
        return status;
    }
};

} // namespace

extern "C" neo_cuda_status neo_cuda_copy_blocks(const neo_cuda_copy *args, void *stream) {
    clear_error();
    NEO_TRY(check(args));
    if (args->count == 0)
        return NEO_CUDA_OK;
    const int64_t pieces = (args->block_bytes + PIECE - 1) / PIECE;
    NEO_NEED(pieces <= INT32_MAX, "block_bytes is %lld: too large", static_cast<long long>(args->block_bytes));
    const Copy kernel{static_cast<const char *>(args->src), static_cast<char *>(args->dst), args->block_bytes,
                      args->src_blocks, args->dst_blocks, args->count_at, args->count, static_cast<int32_t>(pieces)};
    const int64_t wanted = args->ctas > 0 ? args->ctas : CTAS;
    const auto ctas = static_cast<unsigned>(std::min(wanted, pieces * args->count));
    launch_kernel(copy_blocks, ctas, THREADS, 0, static_cast<cudaStream_t>(stream), kernel);
    return launched("copying blocks");
}

extern "C" neo_cuda_status neo_cuda_copy_runs(const neo_cuda_copy *args, void *stream) {
    clear_error();
    NEO_TRY(check(args));
    NEO_NEED(args->count_at == nullptr, "count_at must be NULL");
    const int32_t *src = args->src_blocks, *dst = args->dst_blocks;
    for (int32_t i = 0; i < args->count; i++)
        NEO_NEED(src[i] >= 0 && dst[i] >= 0, "pair %d names block %d and block %d, none may be negative", i, src[i], dst[i]);
    const Runs runs(*args);
    return from_cuda(runs.copy(static_cast<cudaStream_t>(stream)), "copying runs of blocks");
}
