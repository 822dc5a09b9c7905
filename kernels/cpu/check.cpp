#include "check.h"

#include <cinttypes>
#include <cmath>

#include "error.h"
#include "kernels.h"

namespace {

#define REFUSE_IF(condition, ...)                                                                                    \
    do {                                                                                                             \
        if (condition)                                                                                               \
            return neo::fail(NEO_CPU_BAD_ARGUMENT, __VA_ARGS__);                                                     \
    } while (0)

constexpr int32_t MAX_HEADS = 4096;

bool known(int32_t dtype) { return dtype == NEO_CPU_FP32 || dtype == NEO_CPU_FP16 || dtype == NEO_CPU_BF16; }

// Entries 0 .. count - 1 of one sequence's table.
neo_cpu_status check_blocks(const int32_t *table, int64_t count, int32_t num_blocks, int64_t sequence) {
    for (int64_t b = 0; b < count; b++)
        REFUSE_IF(table[b] < 0 || table[b] >= num_blocks,
                  "block_tables[%" PRId64 "][%" PRId64 "] is %d, the cache has %d blocks", sequence, b, table[b],
                  num_blocks);
    return NEO_CPU_OK;
}

} // namespace

neo_cpu_status neo::check(const neo_cpu_cache *cache) noexcept {
    REFUSE_IF(cache == nullptr, "cache must not be NULL");
    REFUSE_IF(cache->size != sizeof(*cache), "cache has size %zu, this library's %zu", cache->size, sizeof(*cache));
    REFUSE_IF(cache->k == nullptr || cache->v == nullptr, "cache: k and v must not be NULL");
    REFUSE_IF(!known(cache->dtype), "cache: unknown dtype %d", cache->dtype);
    REFUSE_IF(cache->head_dim < 16 || cache->head_dim > 256 || cache->head_dim % 16 != 0,
              "head_dim is %d, must be a multiple of 16 from 16 to 256", cache->head_dim);
    REFUSE_IF(cache->block_size != 8 && cache->block_size != 16 && cache->block_size != 32,
              "block_size is %d, must be 8, 16 or 32", cache->block_size);
    REFUSE_IF(cache->num_blocks < 1, "num_blocks is %d, must be positive", cache->num_blocks);
    REFUSE_IF(cache->kv_heads < 1 || cache->kv_heads > MAX_HEADS, "kv_heads is %d, must be 1 to %d", cache->kv_heads,
              MAX_HEADS);
    const int64_t plane = int64_t{cache->head_dim} * cache->block_size;
    REFUSE_IF(cache->kv_heads > 1 && cache->head_stride < plane,
              "head_stride is %" PRId64 ", K of a head alone takes %" PRId64, cache->head_stride, plane);
    REFUSE_IF(cache->num_blocks > 1 && cache->block_stride < plane,
              "block_stride is %" PRId64 ", K of a head alone takes %" PRId64, cache->block_stride, plane);
    return NEO_CPU_OK;
}

neo_cpu_status neo::check(const neo_cpu_decode *args) noexcept {
    REFUSE_IF(args == nullptr, "args must not be NULL");
    REFUSE_IF(args->size != sizeof(*args), "decode arguments have size %zu, this library's %zu", args->size,
              sizeof(*args));
    if (const neo_cpu_status status = check(args->cache))
        return status;
    const neo_cpu_cache &cache = *args->cache;
    REFUSE_IF(args->batch < 0, "batch is %d, must not be negative", args->batch);
    REFUSE_IF(args->q_heads < 1 || args->q_heads > MAX_HEADS || args->q_heads % cache.kv_heads != 0,
              "q_heads is %d, must be a multiple of kv_heads (%d), at most %d", args->q_heads, cache.kv_heads,
              MAX_HEADS);
    REFUSE_IF(!known(args->io_dtype), "unknown io_dtype %d", args->io_dtype);
    REFUSE_IF(!std::isfinite(args->scale), "scale is %g, must be finite", static_cast<double>(args->scale));
    if (args->batch == 0)
        return NEO_CPU_OK;
    REFUSE_IF(args->q == nullptr || args->out == nullptr, "q and out must not be NULL");
    REFUSE_IF(args->lengths == nullptr, "lengths must not be NULL");
    REFUSE_IF(args->q_head_stride < 0 || args->q_stride < 0, "strides of q must not be negative");
    REFUSE_IF(args->q_heads > 1 && args->out_head_stride < cache.head_dim,
              "out_head_stride is %" PRId64 ", a head takes %d", args->out_head_stride, cache.head_dim);
    REFUSE_IF(args->batch > 1 && args->out_stride < cache.head_dim, "out_stride is %" PRId64 ", a head takes %d",
              args->out_stride, cache.head_dim);
    REFUSE_IF(args->sequences == nullptr && args->batch > args->n_sequences,
              "%d queries for %d sequences: give each query's sequence", args->batch, args->n_sequences);
    for (int32_t i = 0; i < args->batch; i++) {
        const int32_t sequence = args->sequences == nullptr ? i : args->sequences[i];
        REFUSE_IF(sequence < 0 || sequence >= args->n_sequences, "sequences[%d] is %d, there are %d", i, sequence,
                  args->n_sequences);
        const int32_t length = args->lengths[i];
        REFUSE_IF(length < 0, "lengths[%d] is %d, must not be negative", i, length);
        const int64_t blocks = (int64_t{length} + cache.block_size - 1) / cache.block_size;
        REFUSE_IF(blocks > 0 && args->block_tables == nullptr, "block_tables must not be NULL");
        REFUSE_IF(blocks > args->table_stride, "lengths[%d] is %d, block_tables has room for %" PRId64 " tokens", i,
                  length, args->table_stride * cache.block_size);
        const int32_t *table = args->block_tables + sequence * args->table_stride;
        if (const neo_cpu_status status = check_blocks(table, blocks, cache.num_blocks, sequence))
            return status;
    }
    return NEO_CPU_OK;
}

neo_cpu_status neo::check(const neo_cpu_append *args) noexcept {
    REFUSE_IF(args == nullptr, "args must not be NULL");
    REFUSE_IF(args->size != sizeof(*args), "append arguments have size %zu, this library's %zu", args->size,
              sizeof(*args));
    if (const neo_cpu_status status = check(args->cache))
        return status;
    const neo_cpu_cache &cache = *args->cache;
    REFUSE_IF(args->rows < 0, "rows is %d, must not be negative", args->rows);
    REFUSE_IF(args->io_dtype != NEO_CPU_FP32 && args->io_dtype != cache.dtype,
              "io_dtype is %d, must be fp32 or the cache's (%d)", args->io_dtype, cache.dtype);
    if (args->rows == 0)
        return NEO_CPU_OK;
    REFUSE_IF(args->k == nullptr || args->v == nullptr, "k and v must not be NULL");
    REFUSE_IF(args->block_tables == nullptr || args->positions == nullptr,
              "block_tables and positions must not be NULL");
    REFUSE_IF(args->k_stride < 0 || args->v_stride < 0, "strides of k and v must not be negative");
    REFUSE_IF(args->sequences == nullptr && args->rows > args->n_sequences,
              "%d rows for %d sequences: give each row's sequence", args->rows, args->n_sequences);
    for (int32_t i = 0; i < args->rows; i++) {
        const int32_t sequence = args->sequences == nullptr ? i : args->sequences[i];
        REFUSE_IF(sequence < 0 || sequence >= args->n_sequences, "sequences[%d] is %d, there are %d", i, sequence,
                  args->n_sequences);
        const int32_t position = args->positions[i];
        const int64_t entry = position / cache.block_size;
        REFUSE_IF(position < 0 || entry >= args->table_stride,
                  "positions[%d] is %d, block_tables has room for %" PRId64 " tokens", i, position,
                  args->table_stride * cache.block_size);
        const int32_t block = args->block_tables[sequence * args->table_stride + entry];
        REFUSE_IF(block < 0 || block >= cache.num_blocks,
                  "block_tables[%d][%" PRId64 "] is %d, the cache has %d blocks", sequence, entry, block,
                  cache.num_blocks);
    }
    return NEO_CPU_OK;
}

neo_cpu_status neo::check(const neo_cpu_copy *args) noexcept {
    REFUSE_IF(args == nullptr, "args must not be NULL");
    REFUSE_IF(args->size != sizeof(*args), "copy arguments have size %zu, this library's %zu", args->size,
              sizeof(*args));
    REFUSE_IF(args->count < 0, "count is %d, must not be negative", args->count);
    REFUSE_IF(args->block_bytes < 1, "block_bytes is %" PRId64 ", must be positive", args->block_bytes);
    if (args->count == 0)
        return NEO_CPU_OK;
    REFUSE_IF(args->src == nullptr || args->dst == nullptr, "src and dst must not be NULL");
    REFUSE_IF(args->src_blocks == nullptr || args->dst_blocks == nullptr,
              "src_blocks and dst_blocks must not be NULL");
    for (int32_t i = 0; i < args->count; i++) {
        const int32_t from = args->src_blocks[i], to = args->dst_blocks[i];
        REFUSE_IF(from < 0 || from >= args->src_count, "src_blocks[%d] is %d, there are %d blocks", i, from,
                  args->src_count);
        REFUSE_IF(to < 0 || to >= args->dst_count, "dst_blocks[%d] is %d, there are %d blocks", i, to,
                  args->dst_count);
    }
    return NEO_CPU_OK;
}
