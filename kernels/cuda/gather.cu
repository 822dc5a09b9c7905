// K and V of tokens that lie in blocks of the cache, as rows that other kernels read: what a chunk attends to.

#include <ptx.cuh>

#include "check.h"

namespace {

using namespace neo;

constexpr int THREADS = 128;
constexpr int MOST_BYTES = 256 * 33 * 4; // shared memory: a plane of K, its lines apart by an odd number of words

struct Gather {
    const void *data;
    const int32_t *tables;
    int64_t table_stride;
    const neo_cuda_gather_entry *entries;
    void *k, *v;
    int32_t heads, dim, block_size, num_blocks;
};

// One entry and head: K's plane is turned on its way through shared memory, V's rows are copied.
template <class T> __global__ void __launch_bounds__(THREADS) gather(const Gather args) {
    NEO_DYNAMIC_SHARED(shared);
    T *const plane = reinterpret_cast<T *>(shared);
    const neo_cuda_gather_entry entry = args.entries[blockIdx.x];
    const int head = blockIdx.y, size = args.block_size, dim = args.dim;
    const int32_t block = args.tables[entry.slot * args.table_stride + entry.index];
    if (static_cast<uint32_t>(block) >= static_cast<uint32_t>(args.num_blocks))
        return;
    const int64_t all = static_cast<int64_t>(dim) * size;
    const T *const from = static_cast<const T *>(args.data) + (static_cast<int64_t>(block) * args.heads + head) * 2 * all;
    const int64_t width = static_cast<int64_t>(args.heads) * dim;
    T *const k = static_cast<T *>(args.k) + entry.row * width + head * dim;
    T *const v = static_cast<T *>(args.v) + entry.row * width + head * dim;
    const int line = size + 2 / static_cast<int>(sizeof(T)) + (sizeof(T) == 4); // one word more: no two lanes in a bank
    for (int i = threadIdx.x; i < all; i += THREADS)
        plane[i / size * line + i % size] = from[i];
    __syncthreads();
    for (int i = threadIdx.x; i < entry.count * dim; i += THREADS) {
        const int token = i / dim, at = i % dim;
        k[token * width + at] = plane[at * line + token];
        v[token * width + at] = from[all + i];
    }
}

} // namespace

extern "C" neo_cuda_status neo_cuda_gather(const neo_cuda_gather_args *args, void *stream) {
    clear_error();
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check(args->cache));
    NEO_NEED(args->count >= 0, "count is %d, must not be negative", args->count);
    if (args->count == 0)
        return NEO_CUDA_OK;
    NEO_TRY(check_table(args->block_tables, args->table_stride));
    NEO_NEED(args->entries != nullptr && args->k != nullptr && args->v != nullptr, "entries, k and v must not be NULL");
    const neo_cuda_cache &cache = *args->cache;
    const Gather kernel{cache.data,    args->block_tables, args->table_stride, args->entries,   args->k,
                        args->v,       cache.kv_heads,     cache.head_dim,     cache.block_size, cache.num_blocks};
    const int64_t by = bytes_of(cache.dtype);
    const int64_t bytes = cache.head_dim * (cache.block_size * by + 4);
    NEO_NEED(bytes <= MOST_BYTES, "head_dim %d and block_size %d: too large", cache.head_dim, cache.block_size);
    const dim3 grid(static_cast<unsigned>(args->count), static_cast<unsigned>(cache.kv_heads));
    const auto on = static_cast<cudaStream_t>(stream);
    if (by == 4)
        launch_kernel(gather<uint32_t>, grid, THREADS, static_cast<size_t>(bytes), on, kernel);
    else
        launch_kernel(gather<uint16_t>, grid, THREADS, static_cast<size_t>(bytes), on, kernel);
    return launched("gathering K and V");
}
