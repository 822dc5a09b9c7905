#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char message[252] = "";
}

void neo::clear_error() noexcept { message[0] = '\0'; }

neo_cuda_status neo::fail(neo_cuda_status status, const char *format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    return status;
}

neo_cuda_status neo::from_cuda(cudaError_t error, const char *doing) noexcept {
    if (error == cudaSuccess)
        return NEO_CUDA_OK;
    return fail(NEO_CUDA_DEVICE, "%s: %s (%s)", doing, cudaGetErrorString(error), cudaGetErrorName(error));
}

neo_cuda_status neo::launched(const char *kernel) noexcept { return from_cuda(cudaGetLastError(), kernel); }

extern "C" const char *neo_cuda_last_error(void) { return message; }
extern "C" int32_t neo_cuda_abi(void) { return NEO_CUDA_ABI; }
extern "C" const char *neo_cuda_version(void) { return "2.0.0"; }
