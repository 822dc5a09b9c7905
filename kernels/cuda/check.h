// Arguments looked at before anything is launched.
#pragma once

#include "error.h"

namespace neo {

neo_cuda_status check(const neo_cuda_cache *cache) noexcept;
neo_cuda_status check_dtype(int32_t dtype) noexcept;
// Table, slots and what must be there when there are rows.
neo_cuda_status check_table(const int32_t *tables, int64_t stride) noexcept;

inline int64_t bytes_of(int32_t dtype) noexcept { return dtype == NEO_CUDA_FP32 ? 4 : 2; }

} // namespace neo
