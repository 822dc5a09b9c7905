// What a worker and those who wait for its jobs share. It outlives the worker while anybody still asks.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "job.h"
#include "neo_cpu.h"

namespace neo {

class Line; // the jobs of one worker, waiting in line

struct Dependency {
    std::shared_ptr<Line> line;
    int64_t ticket;
};

class Line {
  public:
    static constexpr int64_t CAPACITY = 4096; // jobs that have not ended, and failures that are remembered

    explicit Line(const neo_cpu_worker_options &options); // throws std::bad_alloc

    // Any thread.
    neo_cpu_status submit(neo_cpu_job *job, std::vector<Dependency> &after, int64_t *ticket);
    neo_cpu_status wait(int64_t ticket, const Patience &patience) noexcept;
    int64_t submitted() const noexcept { return submitted_.load(std::memory_order_acquire); }
    int64_t finished() const noexcept { return finished_.load(std::memory_order_acquire); }
    int32_t spin_us() const noexcept { return spin_us_; }
    void stop() noexcept;

    // The worker's thread.
    void work() noexcept;

  private:
    struct Entry {
        neo_cpu_job *job = nullptr;
        std::vector<Dependency> after;
    };
    struct Failure {
        int64_t ticket;
        int32_t status;
        char message[sizeof(neo_cpu_job::message)];
    };

    bool await_job(int64_t ticket) noexcept;
    neo_cpu_status await_all(const std::vector<Dependency> &after) noexcept;
    void perform(Entry &entry, int64_t ticket) noexcept;
    void remember(int64_t ticket, const neo_cpu_job &job) noexcept;
    void finish(int64_t ticket) noexcept;
    bool sleep_until_finished(int64_t ticket, int64_t until_ns, const std::atomic<bool> *stop) noexcept;
    neo_cpu_status outcome(int64_t ticket) noexcept;

    neo_cpu_pool *const pool_;
    const int64_t flag_timeout_us_;
    const int32_t core_;
    const int32_t spin_us_;

    std::mutex mutex_;                // the ring's writers, who sleeps, failures
    std::condition_variable work_;    // the worker sleeps here when it has nothing to do
    std::condition_variable ended_;   // and here those who wait for a ticket
    bool asleep_ = false;
    std::vector<Entry> ring_;         // of ticket t: t % CAPACITY
    std::vector<Failure> failures_;   // the n-th: (n - 1) % CAPACITY; tickets rise
    std::atomic<int64_t> failed_{0};
    std::atomic<int> waiters_{0};
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<int64_t> submitted_{0};
    alignas(64) std::atomic<int64_t> finished_{0};
};

} // namespace neo

struct neo_cpu_worker {
    std::shared_ptr<neo::Line> line;
    std::thread thread;
};
