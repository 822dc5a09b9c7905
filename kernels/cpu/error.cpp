#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char message[252] = "";
}

void neo::clear_error() noexcept { message[0] = '\0'; }

neo_cpu_status neo::fail(neo_cpu_status status, const char *format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    return status;
}

extern "C" const char *neo_cpu_last_error(void) { return message; }
