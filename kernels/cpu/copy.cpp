// Whole blocks from one memory to another.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "check.h"
#include "error.h"
#include "pool.h"

namespace {

constexpr int64_t BYTES_PER_TASK = 256 * 1024; // some 25 us: small enough to share out, large enough to hide the counter

struct Copy {
    const neo_cpu_copy &args;
    const int32_t blocks_per_task;
    std::atomic<int64_t> next{0};
};

void work(void *context, int) noexcept {
    Copy &copy = *static_cast<Copy *>(context);
    const neo_cpu_copy &args = copy.args;
    for (;;) {
        const int64_t first = copy.next.fetch_add(copy.blocks_per_task, std::memory_order_relaxed);
        if (first >= args.count)
            return;
        const int64_t end = std::min<int64_t>(first + copy.blocks_per_task, args.count);
        for (int64_t i = first; i < end; i++)
            std::memcpy(static_cast<char *>(args.dst) + args.dst_blocks[i] * args.block_bytes,
                        static_cast<const char *>(args.src) + args.src_blocks[i] * args.block_bytes,
                        static_cast<size_t>(args.block_bytes));
    }
}

} // namespace

extern "C" neo_cpu_status neo_cpu_copy_blocks(neo_cpu_pool *pool, const neo_cpu_copy *args) {
    neo::clear_error();
    if (const neo_cpu_status status = neo::check(args))
        return status;
    const int64_t per_task = std::clamp<int64_t>(BYTES_PER_TASK / args->block_bytes, 1, BYTES_PER_TASK);
    Copy copy{*args, static_cast<int32_t>(per_task)};
    if (pool == nullptr || args->count <= per_task) {
        work(&copy, 0);
        return NEO_CPU_OK;
    }
    std::lock_guard<std::mutex> lock(pool->mutex);
    pool->run(work, &copy);
    return NEO_CPU_OK;
}
