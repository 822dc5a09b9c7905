#include "check.h"

neo_cuda_status neo::check_dtype(int32_t dtype) noexcept {
    NEO_NEED(dtype >= NEO_CUDA_FP32 && dtype <= NEO_CUDA_BF16, "dtype is %d, must be 0 (fp32), 1 (fp16) or 2 (bf16)",
             dtype);
    return NEO_CUDA_OK;
}

neo_cuda_status neo::check(const neo_cuda_cache *cache) noexcept {
    NEO_NEED_SIZE(cache, "cache");
    NEO_TRY(check_dtype(cache->dtype));
    NEO_NEED(cache->kv_heads > 0, "kv_heads is %d, must be positive", cache->kv_heads);
    NEO_NEED(cache->num_blocks >= 0, "num_blocks is %d, must not be negative", cache->num_blocks);
    NEO_NEED(cache->block_size == 8 || cache->block_size == 16 || cache->block_size == 32,
             "block_size is %d, must be 8, 16 or 32", cache->block_size);
    const int32_t d = cache->head_dim;
    if (cache->dtype == NEO_CUDA_FP32)
        NEO_NEED(d >= 16 && d <= 256 && d % 16 == 0, "head_dim is %d, must be a multiple of 16 up to 256", d);
    else
        NEO_NEED(d == 64 || d == 80 || d == 96 || d == 128 || d == 256,
                 "head_dim is %d, must be 64, 80, 96, 128 or 256 in 16 bits", d);
    NEO_NEED(cache->num_blocks == 0 || cache->data != nullptr, "cache: data must not be NULL");
    NEO_NEED(aligned(cache->data, 16), "cache: data must be aligned to 16 bytes");
    return NEO_CUDA_OK;
}

neo_cuda_status neo::check_table(const int32_t *tables, int64_t stride) noexcept {
    NEO_NEED(tables != nullptr, "block_tables must not be NULL");
    NEO_NEED(stride > 0, "table_stride is %lld, must be positive", static_cast<long long>(stride));
    return NEO_CUDA_OK;
}
