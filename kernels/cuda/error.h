// The message of the last failure on this thread.
#pragma once

#include <cuda_runtime_api.h>

#include "neo_cuda.h"

namespace neo {

void clear_error() noexcept;
// printf-like; returns `status` so that a check is one line.
neo_cuda_status fail(neo_cuda_status status, const char *format, ...) noexcept __attribute__((format(printf, 2, 3)));
// NEO_CUDA_OK, or the runtime's words about what was being done.
neo_cuda_status from_cuda(cudaError_t error, const char *doing) noexcept;
// Of the launch just made.
neo_cuda_status launched(const char *kernel) noexcept;

inline bool aligned(const void *pointer, uintptr_t to) noexcept {
    return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

} // namespace neo

// In functions that return a status: leaves with the first failure.
#define NEO_TRY(call)                                                                                                  \
    do {                                                                                                               \
        if (const neo_cuda_status status_ = (call))                                                                    \
            return status_;                                                                                            \
    } while (false)
// Refuses an argument.
#define NEO_NEED(condition, ...)                                                                                       \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return neo::fail(NEO_CUDA_BAD_ARGUMENT, __VA_ARGS__);                                                      \
    } while (false)
// First field of every struct.
#define NEO_NEED_SIZE(args, name)                                                                                      \
    do {                                                                                                               \
        NEO_NEED((args) != nullptr, name " must not be NULL");                                                         \
        NEO_NEED((args)->size == sizeof(*(args)), name " has size %zu, this library's %zu", (args)->size,              \
                 sizeof(*(args)));                                                                                     \
    } while (false)
