// One new row of K and V into the paged cache.
#pragma once

#include "neo_cpu.h"

namespace neo {

// Of arguments that have been checked.
void append_row(const neo_cpu_append &args, int32_t row) noexcept;

} // namespace neo
