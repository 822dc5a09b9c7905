// One job, whoever runs it.
#pragma once

#include <atomic>

#include "neo_cpu.h"

namespace neo {

// How a thread waits: spins for spin_us (-1: always), then naps; gives up after timeout_us, or when *stop is set.
struct Patience {
    int32_t spin_us;
    int64_t timeout_us;
    const std::atomic<bool> *stop; // or null
};

// Until a flag has reached a number; `name` is for the message where it does not.
neo_cpu_status await_number(const volatile uint32_t *flag, uint32_t number, const char *name,
                            const Patience &patience) noexcept;
// Waits for the job's flag, runs it with its own pool or this one, and ends it.
void run_job(neo_cpu_job &job, neo_cpu_pool *pool, const Patience &patience) noexcept;
// Ends a job that was not run, with the status of this thread's last error.
void end_unrun(neo_cpu_job &job, neo_cpu_status status) noexcept;

} // namespace neo
