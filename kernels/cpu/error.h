// The message of the last failure on this thread.
#pragma once

#include "neo_cpu.h"

namespace neo {

void clear_error() noexcept;
// printf-like; returns `status` so that a check is one line.
neo_cpu_status fail(neo_cpu_status status, const char *format, ...) noexcept __attribute__((format(printf, 2, 3)));

} // namespace neo
