// Several appends and attentions in one run of the threads.
#pragma once

#include "neo_cpu.h"

namespace neo {

// What one stage of a hand-over does: append, then attend. Either may be NULL.
struct Part {
    const neo_cpu_append *append;
    const neo_cpu_decode *decode;
};

// Called for each part, in their order, once it and all before it are done; by any of the threads, never by two at once.
using Done = void (*)(void *context, int32_t part) noexcept;

constexpr int32_t MAX_PARTS = 32;

// Parts begin in their order, and no thread waits for the others between two of them. An error is found before anything
// is touched; `wrong` is then the part that has it. `pool` may be NULL where no part has anything to do.
neo_cpu_status attend_all(neo_cpu_pool *pool, const Part *parts, int32_t count, Done done, void *context,
                          int32_t *wrong) noexcept;

// Bytes of partial results of a part's attention, as far as its lengths can be read.
int64_t partial_bytes(const neo_cpu_decode *decode) noexcept;

} // namespace neo
