// A fixed set of threads that all run one function, and a workspace that calls share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "neo_cpu.h"

namespace neo {

// Memory that only grows, aligned to cache lines; contents are lost when it grows.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { std::free(data_); }
    // Null when there is no memory.
    template <typename T> T *at_least(size_t count) noexcept {
        return static_cast<T *>(reserve(count * sizeof(T)));
    }
    template <typename T> T *get() const noexcept { return static_cast<T *>(data_); }

  private:
    void *reserve(size_t bytes) noexcept;
    void *data_ = nullptr;
    size_t bytes_ = 0;
};

} // namespace neo

struct neo_cpu_pool {
  public:
    using Function = void (*)(void *context, int worker);

    // Throws what std::thread and std::vector throw; the caller turns that into a status.
    explicit neo_cpu_pool(const neo_cpu_pool_options &options);
    ~neo_cpu_pool();

    int threads() const noexcept { return static_cast<int>(workers_.size()) + 1; }
    // Runs function(context, 0 .. threads - 1), 0 on this thread, and returns when all have. Hold `mutex`.
    void run(Function function, void *context) noexcept;
    void begin_step() noexcept { steps_.fetch_add(1); wake(); }
    bool end_step() noexcept;

    const int segment;  // as in neo_cpu_pool_options
    const int prefetch; // likewise

    std::mutex mutex;                           // one call at a time
    neo::Buffer shared;                         // partial results
    neo::Buffer tasks;                          // pieces and counters
    std::unique_ptr<neo::Buffer[]> per_worker;  // queries and scores

  private:
    void work(int worker, int core) noexcept;
    unsigned wait_for_work(unsigned seen) noexcept;
    void wake() noexcept;
    void stop() noexcept;

    std::vector<std::thread> workers_;
    const long spin_us_;
    Function function_ = nullptr;
    void *context_ = nullptr;
    std::atomic<bool> stopping_{false};
    std::atomic<int> steps_{0};
    std::atomic<int> sleepers_{0};
    std::mutex sleep_mutex_;
    std::condition_variable sleep_;
    alignas(64) std::atomic<unsigned> generation_{0};
    alignas(64) std::atomic<int> running_{0};
};
