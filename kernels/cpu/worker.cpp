// Threads that run jobs in order. A job comes after tickets that have been given out already, so no two can wait for
// each other.

#include "worker.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>

#include "error.h"
#include "thread.h"

namespace {

constexpr int32_t MAX_AFTER = 1024;
constexpr char DEPENDENCY[] = "dependency failed: ";
// A worker that sleeps until another's job has ended looks this often whether it is itself to stop.
constexpr int64_t LOOK_NS = 10 * 1000 * 1000;
constexpr int64_t NEVER = std::numeric_limits<int64_t>::max();

} // namespace

neo::Line::Line(const neo_cpu_worker_options &options)
    : pool_(options.pool), flag_timeout_us_(options.flag_timeout_us), core_(options.core), spin_us_(options.spin_us),
      ring_(CAPACITY) {
    failures_.reserve(CAPACITY); // so that remembering cannot fail
}

neo_cpu_status neo::Line::submit(neo_cpu_job *job, std::vector<Dependency> &after, int64_t *ticket) {
    bool wake;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const int64_t mine = submitted_.load(std::memory_order_relaxed) + 1;
        if (mine - finished() > CAPACITY)
            return fail(NEO_CPU_FULL, "%lld jobs have not ended yet: no room for more",
                        static_cast<long long>(CAPACITY));
        Entry &entry = ring_[mine % CAPACITY];
        entry.job = job;
        entry.after.swap(after);
        if (ticket != nullptr)
            *ticket = mine;
        submitted_.store(mine, std::memory_order_release);
        wake = asleep_;
    }
    if (wake)
        work_.notify_one();
    return NEO_CPU_OK;
}

void neo::Line::stop() noexcept {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_.store(true);
    }
    work_.notify_one();
}

// True when there is such a job; false when there is none and never will be.
bool neo::Line::await_job(int64_t ticket) noexcept {
    const int64_t began = now_ns();
    for (;;) {
        for (int i = 0; i < SPINS_PER_LOOK; i++) {
            if (submitted() >= ticket)
                return true;
            relax();
        }
        if (stopping_.load(std::memory_order_relaxed))
            return submitted() >= ticket;
        if (spin_us_ < 0 || now_ns() - began < int64_t{spin_us_} * 1000)
            continue;
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_ = true;
        work_.wait(lock, [&] { return submitted() >= ticket || stopping_.load(); });
        asleep_ = false;
    }
}

// Also after a failure the others are waited for: a job that has ended leaves nothing behind it running.
neo_cpu_status neo::Line::await_all(const std::vector<Dependency> &after) noexcept {
    char reason[sizeof(neo_cpu_job::message)];
    bool failed = false;
    for (const Dependency &one : after) {
        const neo_cpu_status status = one.line->wait(one.ticket, Patience{spin_us_, -1, &stopping_});
        if (status == NEO_CPU_TIMEOUT)
            return fail(NEO_CPU_CANCELLED, "the worker was closed while the job waited for another");
        if (status != NEO_CPU_OK && !failed) {
            std::snprintf(reason, sizeof(reason), "%s", neo_cpu_last_error());
            failed = true;
        }
    }
    if (!failed)
        return NEO_CPU_OK;
    const bool said = std::strncmp(reason, DEPENDENCY, sizeof(DEPENDENCY) - 1) == 0;
    return fail(NEO_CPU_DEPENDENCY, "%s%s", said ? "" : DEPENDENCY, reason);
}

void neo::Line::perform(Entry &entry, int64_t ticket) noexcept {
    neo_cpu_job &job = *entry.job;
    neo_cpu_status status = NEO_CPU_OK;
    if (stopping_.load(std::memory_order_relaxed))
        status = fail(NEO_CPU_CANCELLED, "the worker was closed before the job's turn came");
    else
        status = await_all(entry.after);
    if (status == NEO_CPU_OK)
        run_job(job, pool_, Patience{spin_us_, flag_timeout_us_, &stopping_});
    else
        end_unrun(job, status);
    if (job.status != NEO_CPU_OK)
        remember(ticket, job);
    entry.after.clear(); // before the ticket ends: the entry is then another's
}

void neo::Line::work() noexcept {
    pin(core_);
    for (int64_t ticket = 1; await_job(ticket); ticket++) {
        perform(ring_[ticket % CAPACITY], ticket);
        finish(ticket);
    }
}

void neo::Line::remember(int64_t ticket, const neo_cpu_job &job) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t before = failed_.load(std::memory_order_relaxed);
    Failure failure{ticket, job.status, {}};
    std::memcpy(failure.message, job.message, sizeof(failure.message));
    if (before < CAPACITY)
        failures_.push_back(failure);
    else
        failures_[before % CAPACITY] = failure;
    failed_.store(before + 1);
}

void neo::Line::finish(int64_t ticket) noexcept {
    finished_.store(ticket); // sequentially consistent with waiters_: no wake-up is lost
    if (waiters_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        ended_.notify_all();
    }
}

bool neo::Line::sleep_until_finished(int64_t ticket, int64_t until_ns, const std::atomic<bool> *stop) noexcept {
    std::unique_lock<std::mutex> lock(mutex_);
    waiters_.fetch_add(1);
    const auto over = [&] { return finished_.load() >= ticket; };
    if (until_ns == NEVER && stop == nullptr)
        ended_.wait(lock, over);
    while (!over()) {
        const int64_t left = until_ns == NEVER ? LOOK_NS : until_ns - now_ns();
        if (left <= 0 || (stop != nullptr && stop->load()))
            break;
        const int64_t nap = stop != nullptr ? std::min(left, LOOK_NS) : left;
        ended_.wait_for(lock, std::chrono::nanoseconds(nap), over);
    }
    waiters_.fetch_sub(1);
    return over();
}

// NEO_CPU_TIMEOUT also when told to stop.
neo_cpu_status neo::Line::wait(int64_t ticket, const Patience &patience) noexcept {
    if (finished() >= ticket)
        return outcome(ticket);
    const int64_t began = now_ns();
    const int64_t limit = patience.timeout_us;
    const int64_t until = limit < 0 || limit > (NEVER - began) / 1000 ? NEVER : began + limit * 1000;
    for (;;) {
        for (int i = 0; i < SPINS_PER_LOOK; i++) {
            if (finished() >= ticket)
                return outcome(ticket);
            relax();
        }
        const int64_t now = now_ns();
        if (now >= until || (patience.stop != nullptr && patience.stop->load(std::memory_order_relaxed)))
            break;
        if (patience.spin_us < 0 || now - began < int64_t{patience.spin_us} * 1000)
            continue;
        if (sleep_until_finished(ticket, until, patience.stop))
            return outcome(ticket);
        break;
    }
    return fail(NEO_CPU_TIMEOUT, "job %lld has not ended after %lld us; the last that has is %lld",
                static_cast<long long>(ticket), static_cast<long long>((now_ns() - began) / 1000),
                static_cast<long long>(finished()));
}

// Of a job that has ended.
neo_cpu_status neo::Line::outcome(int64_t ticket) noexcept {
    if (failed_.load() == 0)
        return NEO_CPU_OK;
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t failed = failed_.load();
    const int64_t known = static_cast<int64_t>(failures_.size());
    for (int64_t n = failed; n > failed - known; n--) {
        const Failure &failure = failures_[(n - 1) % CAPACITY];
        if (failure.ticket == ticket)
            return fail(static_cast<neo_cpu_status>(failure.status), "%s", failure.message);
        if (failure.ticket < ticket)
            return NEO_CPU_OK;
    }
    if (failed == known)
        return NEO_CPU_OK;
    return fail(NEO_CPU_BAD_ARGUMENT, "job %lld ended too long ago: since then %lld have failed",
                static_cast<long long>(ticket), static_cast<long long>(known));
}

namespace {

using neo::fail;

neo_cpu_status check(const neo_cpu_worker_options *options) noexcept {
    if (options->size != sizeof(*options))
        return fail(NEO_CPU_BAD_ARGUMENT, "worker options have size %zu, this library's %zu", options->size,
                    sizeof(*options));
    if (options->core < -1)
        return fail(NEO_CPU_BAD_ARGUMENT, "core is %d, must be -1 or more", options->core);
    if (options->spin_us < -1)
        return fail(NEO_CPU_BAD_ARGUMENT, "spin_us is %d, must be -1 or more", options->spin_us);
    if (options->flag_timeout_us < 0)
        return fail(NEO_CPU_BAD_ARGUMENT, "flag_timeout_us is %lld, must not be negative",
                    static_cast<long long>(options->flag_timeout_us));
    return NEO_CPU_OK;
}

neo_cpu_status check(const neo_cpu_job *job, const neo_cpu_after *after, int32_t n_after) noexcept {
    if (job == nullptr)
        return fail(NEO_CPU_BAD_ARGUMENT, "job must not be NULL");
    if (job->size != sizeof(*job))
        return fail(NEO_CPU_BAD_ARGUMENT, "job has size %zu, this library's %zu", job->size, sizeof(*job));
    if (n_after < 0 || n_after > MAX_AFTER)
        return fail(NEO_CPU_BAD_ARGUMENT, "n_after is %d, must be 0 to %d", n_after, MAX_AFTER);
    if (n_after > 0 && after == nullptr)
        return fail(NEO_CPU_BAD_ARGUMENT, "after must not be NULL");
    for (int32_t i = 0; i < n_after; i++) {
        if (after[i].worker == nullptr)
            return fail(NEO_CPU_BAD_ARGUMENT, "after[%d]: worker must not be NULL", i);
        const int64_t last = after[i].worker->line->submitted();
        if (after[i].ticket < 1 || after[i].ticket > last)
            return fail(NEO_CPU_BAD_ARGUMENT, "after[%d]: there is no job %lld, the last is %lld", i,
                        static_cast<long long>(after[i].ticket), static_cast<long long>(last));
    }
    return NEO_CPU_OK;
}

} // namespace

extern "C" {

neo_cpu_status neo_cpu_worker_create(const neo_cpu_worker_options *options, neo_cpu_worker **worker) {
    neo::clear_error();
    if (options == nullptr || worker == nullptr)
        return fail(NEO_CPU_BAD_ARGUMENT, "options and worker must not be NULL");
    *worker = nullptr;
    if (const neo_cpu_status status = check(options))
        return status;
    try {
        auto made = std::make_unique<neo_cpu_worker>();
        made->line = std::make_shared<neo::Line>(*options);
        made->thread = std::thread(&neo::Line::work, made->line.get());
        *worker = made.release();
    } catch (...) {
        return fail(NEO_CPU_NO_MEMORY, "could not start a worker's thread");
    }
    return NEO_CPU_OK;
}

void neo_cpu_worker_destroy(neo_cpu_worker *worker) {
    if (worker == nullptr)
        return;
    worker->line->stop();
    worker->thread.join();
    delete worker;
}

neo_cpu_status neo_cpu_worker_submit(neo_cpu_worker *worker, neo_cpu_job *job, const neo_cpu_after *after,
                                     int32_t n_after, int64_t *ticket) {
    neo::clear_error();
    if (worker == nullptr)
        return fail(NEO_CPU_BAD_ARGUMENT, "worker must not be NULL");
    if (const neo_cpu_status status = check(job, after, n_after))
        return status;
    try {
        std::vector<neo::Dependency> copied;
        copied.reserve(static_cast<size_t>(n_after));
        for (int32_t i = 0; i < n_after; i++)
            copied.push_back(neo::Dependency{after[i].worker->line, after[i].ticket});
        return worker->line->submit(job, copied, ticket);
    } catch (...) {
        return fail(NEO_CPU_NO_MEMORY, "no memory for a job that comes after %d others", n_after);
    }
}

neo_cpu_status neo_cpu_worker_wait(neo_cpu_worker *worker, int64_t ticket, int64_t timeout_us) {
    neo::clear_error();
    if (worker == nullptr)
        return fail(NEO_CPU_BAD_ARGUMENT, "worker must not be NULL");
    neo::Line &line = *worker->line;
    const int64_t last = line.submitted();
    if (ticket < 1 || ticket > last)
        return fail(NEO_CPU_BAD_ARGUMENT, "there is no job %lld, the last is %lld", static_cast<long long>(ticket),
                    static_cast<long long>(last));
    return line.wait(ticket, neo::Patience{line.spin_us(), timeout_us, nullptr});
}

int64_t neo_cpu_worker_finished(const neo_cpu_worker *worker) {
    return worker == nullptr ? 0 : worker->line->finished();
}

} // extern "C"
