#include "job.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>

#include "error.h"
#include "handover.h"
#include "thread.h"

namespace {

// A device cannot wake a thread, so who waits for its flag must look. Naps grow with the time waited, so that what
// looking late adds stays within a sixteenth of it, and a long wait costs about a percent of a core.
constexpr int64_t SHORTEST_NAP_US = 50, LONGEST_NAP_US = 1000, NAPS = 16;
constexpr neo::Patience OF_CALLBACKS{50, 10000000, nullptr};

neo_cpu_status await_flag(const neo_cpu_job &job, const neo::Patience &patience) noexcept {
    if (job.wait_flag == nullptr)
        return NEO_CPU_OK;
    return neo::await_number(job.wait_flag, job.wait_value, "wait_flag", patience);
}

neo_cpu_status compute(const neo_cpu_job &job, neo_cpu_pool *pool, const neo::Patience &patience) noexcept {
    neo_cpu_status status = NEO_CPU_OK;
    if (job.append != nullptr)
        status = neo_cpu_append_kv(pool, job.append);
    if (status == NEO_CPU_OK && job.decode != nullptr)
        status = neo_cpu_decode_attention(pool, job.decode);
    if (status == NEO_CPU_OK && job.copy != nullptr)
        status = neo_cpu_copy_blocks(pool, job.copy);
    if (status == NEO_CPU_OK && job.handover != nullptr)
        status = neo::serve(*job.handover, pool, patience);
    return status;
}

// The flag comes last: who sees it may read all else.
void end(neo_cpu_job &job, neo_cpu_status status) noexcept {
    job.status = status;
    std::snprintf(job.message, sizeof(job.message), "%s", status == NEO_CPU_OK ? "" : neo_cpu_last_error());
    if (status != NEO_CPU_OK && job.handover != nullptr)
        neo::release(*job.handover);
    job.end_ns = neo::now_ns();
    if (job.done_flag != nullptr)
        __atomic_store_n(job.done_flag, job.done_value, __ATOMIC_RELEASE);
}

} // namespace

neo_cpu_status neo::await_number(const volatile uint32_t *flag, uint32_t number, const char *name,
                                 const Patience &patience) noexcept {
    const int64_t began = now_ns();
    for (;;) {
        for (int i = 0; i < SPINS_PER_LOOK; i++) {
            if (static_cast<int32_t>(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - number) >= 0)
                return NEO_CPU_OK;
            relax();
        }
        if (patience.stop != nullptr && patience.stop->load(std::memory_order_relaxed))
            return fail(NEO_CPU_CANCELLED, "the worker was closed while the job waited for its flag");
        const int64_t waited_us = (now_ns() - began) / 1000;
        if (waited_us >= patience.timeout_us)
            return fail(NEO_CPU_NO_FLAG, "%s is %u and not yet %u after %lld us", name,
                        __atomic_load_n(flag, __ATOMIC_RELAXED), number, static_cast<long long>(waited_us));
        if (patience.spin_us >= 0 && waited_us >= patience.spin_us)
            std::this_thread::sleep_for(
                std::chrono::microseconds(std::clamp(waited_us / NAPS, SHORTEST_NAP_US, LONGEST_NAP_US)));
    }
}

void neo::run_job(neo_cpu_job &job, neo_cpu_pool *pool, const Patience &patience) noexcept {
    neo_cpu_status status = await_flag(job, patience);
    job.start_ns = now_ns();
    if (status == NEO_CPU_OK)
        status = compute(job, job.pool != nullptr ? job.pool : pool, patience);
    end(job, status);
}

void neo::end_unrun(neo_cpu_job &job, neo_cpu_status status) noexcept {
    job.start_ns = now_ns();
    end(job, status);
}

extern "C" void neo_cpu_run(void *pointer) {
    neo_cpu_job *job = static_cast<neo_cpu_job *>(pointer);
    if (job != nullptr && job->size == sizeof(*job))
        neo::run_job(*job, nullptr, OF_CALLBACKS);
}
