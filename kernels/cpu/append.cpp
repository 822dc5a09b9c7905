// New rows of K and V into the paged cache.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "append.h"
#include "check.h"
#include "error.h"
#include "kernels.h"
#include "pool.h"

namespace {

constexpr int32_t MAX_HEAD_DIM = 256;
constexpr int32_t ROWS_PER_TASK = 16; // small enough to share out, large enough to hide the counter

struct Append {
    const neo_cpu_append &args;
    std::atomic<int32_t> next{0};
};

// The row as the cache's type: the caller's own memory when nothing has to be converted.
const void *as_cache_type(const neo_cpu_append &args, const void *row, void *space) noexcept {
    if (args.io_dtype == args.cache->dtype)
        return row;
    neo::store(args.cache->dtype, static_cast<const float *>(row), space, args.cache->head_dim);
    return space;
}

template <typename Element>
void write_head(const neo_cpu_cache &cache, int64_t offset, int32_t slot, const void *k, const void *v) noexcept {
    Element *column = static_cast<Element *>(cache.k) + offset + slot;
    const Element *from = static_cast<const Element *>(k);
    for (int32_t d = 0; d < cache.head_dim; d++)
        column[int64_t{d} * cache.block_size] = from[d];
    Element *row = static_cast<Element *>(cache.v) + offset + int64_t{slot} * cache.head_dim;
    std::memcpy(row, v, sizeof(Element) * cache.head_dim);
}

void write_row(const neo_cpu_append &args, int32_t i) noexcept {
    const neo_cpu_cache &cache = *args.cache;
    const int32_t sequence = args.sequences == nullptr ? i : args.sequences[i];
    const int32_t block = args.block_tables[sequence * args.table_stride + args.positions[i] / cache.block_size];
    const int32_t slot = args.positions[i] % cache.block_size;
    const int64_t bytes = neo::bytes_of(args.io_dtype);
    const char *k = static_cast<const char *>(args.k) + i * args.k_stride * bytes;
    const char *v = static_cast<const char *>(args.v) + i * args.v_stride * bytes;
    alignas(64) float k_space[MAX_HEAD_DIM], v_space[MAX_HEAD_DIM];
    for (int32_t h = 0; h < cache.kv_heads; h++) {
        const int64_t offset = block * cache.block_stride + h * cache.head_stride;
        const void *k_row = as_cache_type(args, k + h * cache.head_dim * bytes, k_space);
        const void *v_row = as_cache_type(args, v + h * cache.head_dim * bytes, v_space);
        if (cache.dtype == NEO_CPU_FP32)
            write_head<uint32_t>(cache, offset, slot, k_row, v_row);
        else
            write_head<uint16_t>(cache, offset, slot, k_row, v_row);
    }
}

} // namespace

void neo::append_row(const neo_cpu_append &args, int32_t row) noexcept { write_row(args, row); }

namespace {

void work(void *context, int) noexcept {
    Append &append = *static_cast<Append *>(context);
    for (;;) {
        const int32_t first = append.next.fetch_add(ROWS_PER_TASK, std::memory_order_relaxed);
        if (first >= append.args.rows)
            return;
        const int32_t end = std::min(first + ROWS_PER_TASK, append.args.rows);
        for (int32_t i = first; i < end; i++)
            write_row(append.args, i);
    }
}

} // namespace

extern "C" neo_cpu_status neo_cpu_append_kv(neo_cpu_pool *pool, const neo_cpu_append *args) {
    neo::clear_error();
    if (pool == nullptr)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "pool must not be NULL");
    if (!neo::supported())
        return neo::fail(NEO_CPU_UNSUPPORTED, "this processor has none of the instruction sets built in");
    if (const neo_cpu_status status = neo::check(args))
        return status;
    Append append{*args};
    if (args->rows <= ROWS_PER_TASK) {
        work(&append, 0);
        return NEO_CPU_OK;
    }
    std::lock_guard<std::mutex> lock(pool->mutex);
    pool->run(work, &append);
    return NEO_CPU_OK;
}
