// What a kernel brings into the L2 cache for the next one: neo_cuda_ahead as kernels take it.
#pragma once

#include "check.h"

namespace neo {

struct Ahead {
    const char *data;
    int64_t stride;
    int32_t rows, bytes;
};

// NULL: nothing.
inline Ahead ahead_of(const neo_cuda_ahead *ahead) noexcept {
    if (ahead == nullptr || ahead->rows == 0)
        return Ahead{};
    return Ahead{static_cast<const char *>(ahead->data), ahead->stride, ahead->rows, ahead->bytes};
}

} // namespace neo
