// Fetching to the L2 cache what the next kernel reads first.
#pragma once

#include <ptx.cuh>

#include "ahead.h"

namespace neo {

// The part of one of so many threads.
__device__ __forceinline__ void fetch_ahead(const Ahead &ahead, int thread, int threads) {
    for (int row = thread; row < ahead.rows; row += threads)
        fetch_to_l2(ahead.data + row * ahead.stride, static_cast<uint32_t>(ahead.bytes));
}

} // namespace neo
