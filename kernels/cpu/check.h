// Arguments looked at before anything is touched: each returns NEO_CPU_OK or the status of a set error.
#pragma once

#include "neo_cpu.h"

namespace neo {

neo_cpu_status check(const neo_cpu_cache *cache) noexcept;
neo_cpu_status check(const neo_cpu_decode *args) noexcept;
neo_cpu_status check(const neo_cpu_append *args) noexcept;
neo_cpu_status check(const neo_cpu_copy *args) noexcept;

} // namespace neo
