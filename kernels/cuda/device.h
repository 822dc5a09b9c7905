// Facts about the current device, asked for once.
#pragma once

#include "error.h"

namespace neo {

struct Device {
    int index;
    int capability;      // 90 for 9.0
    int multiprocessors;
    int shared_of_sm;    // bytes
    int shared_of_block; // bytes a block may opt in to
    int l2;              // bytes
};

neo_cuda_status current_device(Device &device) noexcept;

// Whether kernels may begin before the one ahead on their stream has ended: see neo_cuda_overlap.
bool overlap_wanted() noexcept;
// Whether kernels let the next one begin as soon as they have waited themselves, where it is a matrix product.
bool release_wanted() noexcept;

} // namespace neo
