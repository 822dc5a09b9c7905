#include "pool.h"

#include <chrono>
#include <new>

#include "error.h"
#include "thread.h"

using neo::SPINS_PER_LOOK;

void *neo::Buffer::reserve(size_t bytes) noexcept {
    constexpr size_t line = 64;
    if (bytes > bytes_ || data_ == nullptr) {
        std::free(data_);
        const size_t rounded = (bytes + bytes / 4 + line) / line * line;
        data_ = std::aligned_alloc(line, rounded);
        bytes_ = data_ == nullptr ? 0 : rounded;
    }
    return data_;
}

neo_cpu_pool::neo_cpu_pool(const neo_cpu_pool_options &options)
    : segment(options.segment), prefetch(options.prefetch), per_worker(new neo::Buffer[options.threads]),
      spin_us_(options.spin_us) {
    workers_.reserve(options.threads - 1);
    try {
        for (int i = 1; i < options.threads; i++)
            workers_.emplace_back(&neo_cpu_pool::work, this, i, i < options.n_cores ? options.cores[i] : -1);
    } catch (...) {
        stop();
        throw;
    }
}

neo_cpu_pool::~neo_cpu_pool() { stop(); }

void neo_cpu_pool::stop() noexcept {
    stopping_.store(true);
    generation_.fetch_add(1);
    wake();
    for (auto &worker : workers_)
        worker.join();
    workers_.clear();
}

bool neo_cpu_pool::end_step() noexcept {
    int steps = steps_.load();
    while (steps > 0)
        if (steps_.compare_exchange_weak(steps, steps - 1))
            return true;
    return false;
}

void neo_cpu_pool::wake() noexcept {
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        sleep_.notify_all();
    }
}

void neo_cpu_pool::run(Function function, void *context) noexcept {
    function_ = function;
    context_ = context;
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1); // sequentially consistent with sleepers_: no wake-up is lost
    wake();
    function(context, 0);
    for (long spins = 0; running_.load(std::memory_order_acquire) != 0; spins++) {
        neo::relax();
        if (spins > 100 * SPINS_PER_LOOK)
            std::this_thread::yield(); // a worker lost its core: let it have this one
    }
}

unsigned neo_cpu_pool::wait_for_work(unsigned seen) noexcept {
    using clock = std::chrono::steady_clock;
    auto until = clock::now() + std::chrono::microseconds(spin_us_);
    for (;;) {
        for (int i = 0; i < SPINS_PER_LOOK; i++) {
            const unsigned now = generation_.load(std::memory_order_acquire);
            if (now != seen)
                return now;
            neo::relax();
        }
        if (steps_.load(std::memory_order_relaxed) > 0) {
            until = clock::now() + std::chrono::microseconds(spin_us_);
        } else if (clock::now() >= until) {
            std::unique_lock<std::mutex> lock(sleep_mutex_);
            sleepers_.fetch_add(1);
            sleep_.wait(lock, [&] { return generation_.load() != seen || steps_.load() > 0; });
            sleepers_.fetch_sub(1);
        }
    }
}

void neo_cpu_pool::work(int worker, int core) noexcept {
    neo::pin(core);
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_work(seen);
        if (stopping_.load())
            return;
        function_(context_, worker);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

extern "C" {

neo_cpu_status neo_cpu_pool_create(const neo_cpu_pool_options *options, neo_cpu_pool **pool) {
    neo::clear_error();
    if (options == nullptr || pool == nullptr)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "options and pool must not be NULL");
    *pool = nullptr;
    if (options->size != sizeof(*options))
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "pool options have size %zu, this library's %zu", options->size,
                         sizeof(*options));
    if (options->threads < 1 || options->threads > 1024)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "threads is %d, must be 1 to 1024", options->threads);
    if (options->n_cores != 0 && (options->n_cores != options->threads || options->cores == nullptr))
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "%d cores (list %s) for %d threads: give one each, or none",
                         options->n_cores, options->cores == nullptr ? "NULL" : "given", options->threads);
    for (int i = 0; i < options->n_cores; i++)
        if (options->cores[i] < 0)
            return neo::fail(NEO_CPU_BAD_ARGUMENT, "cores[%d] is %d", i, options->cores[i]);
    if (options->spin_us < 0)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "spin_us is %d, must not be negative", options->spin_us);
    if (options->prefetch < NEO_CPU_PREFETCH_AUTO || options->prefetch > NEO_CPU_PREFETCH_WHOLE)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "unknown prefetch %d", options->prefetch);
    if (options->segment != 0 && options->segment != 32 && options->segment != 64 && options->segment != 128)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "segment is %d, must be 0, 32, 64 or 128", options->segment);
    try {
        *pool = new neo_cpu_pool(*options);
    } catch (...) {
        return neo::fail(NEO_CPU_NO_MEMORY, "could not start %d threads", options->threads);
    }
    return NEO_CPU_OK;
}

void neo_cpu_pool_destroy(neo_cpu_pool *pool) { delete pool; }

int32_t neo_cpu_pool_threads(const neo_cpu_pool *pool) { return pool == nullptr ? 0 : pool->threads(); }

neo_cpu_status neo_cpu_pool_begin_step(neo_cpu_pool *pool) {
    neo::clear_error();
    if (pool == nullptr)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "pool must not be NULL");
    pool->begin_step();
    return NEO_CPU_OK;
}

neo_cpu_status neo_cpu_pool_end_step(neo_cpu_pool *pool) {
    neo::clear_error();
    if (pool == nullptr)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "pool must not be NULL");
    if (!pool->end_step())
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "end_step without begin_step");
    return NEO_CPU_OK;
}

} // extern "C"
