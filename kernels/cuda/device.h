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

} // namespace neo
