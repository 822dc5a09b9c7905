// What threads that spin have in common.
#pragma once

#include <cstdint>
#include <ctime>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace neo {

constexpr int SPINS_PER_LOOK = 64; // pauses between looks at the clock (about 1 us)

inline void relax() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A core that is gone or forbidden is no reason to fail: the thread then runs where the system puts it.
inline void pin(int core) noexcept {
#ifdef __linux__
    if (core < 0 || core >= CPU_SETSIZE)
        return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
#else
    (void)core;
#endif
}

// The clock of Python's time.perf_counter.
inline int64_t now_ns() noexcept {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

} // namespace neo
