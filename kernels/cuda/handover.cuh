// What kernels that hand rows to the host and take rows back have in common. See neo_cuda.h for the protocol.
#pragma once

#include <algorithm>

#include <ptx.cuh>

#include "check.h"

namespace {

using namespace neo;

constexpr int THREADS = 256;
constexpr int AHEAD = 8;                  // loads of 16 bytes that a thread has under way
constexpr int MAX_CTAS = 16;
// Below that, another block of threads gains less than it costs. Blocks that post wait for each other.
constexpr int BYTES_OF_POST = THREADS * AHEAD * 16, BYTES_OF_AWAIT = BYTES_OF_POST / 2;
constexpr unsigned POLL_NS = 20;

// Of a channel, in device memory: one load. What a kernel reads at its beginning it asks for before it waits for any of it.
struct alignas(16) State {
    uint32_t arrived; // blocks of the post that runs
    uint32_t number;  // posts so far
    uint32_t failed;
    uint32_t unused;
};

__device__ State state_of(const State *state) {
    const uint4 words = __ldcg(reinterpret_cast<const uint4 *>(state));
    return State{words.x, words.y, words.z, words.w};
}

__device__ int rows_of(const int32_t *rows_at, int rows) {
    return rows_at == nullptr ? rows : max(0, min(rows, *static_cast<const volatile int32_t *>(rows_at)));
}

// Word `column` of 16 bytes of a row.
struct Place {
    int row, column;
};

// All words of so many rows, by all threads of the grid: each comes from from(place) and goes to to(place).
template <class From, class To> __device__ void copy_words(int rows, int row_words, From from, To to) {
    const unsigned words = static_cast<unsigned>(rows) * static_cast<unsigned>(row_words); // fewer than 2^31: check_rows
    const unsigned step = gridDim.x * THREADS;
    for (unsigned first = blockIdx.x * THREADS + threadIdx.x; first < words; first += step * AHEAD) {
        uint4 kept[AHEAD] = {};
        Place places[AHEAD];
#pragma unroll
        for (unsigned i = 0; i < AHEAD; i++) {
            const unsigned word = first + i * step, row = word / static_cast<unsigned>(row_words);
            places[i] = Place{static_cast<int>(row), static_cast<int>(word - row * static_cast<unsigned>(row_words))};
            if (word < words)
                kept[i] = __ldcv(from(places[i]));
        }
#pragma unroll
        for (unsigned i = 0; i < AHEAD; i++)
            if (first + i * step < words)
                __stcs(to(places[i]), kept[i]);
    }
}

// Once all blocks have written their rows: the number behind them. All threads of all blocks call it, at their end.
__device__ void post_number(State *state, uint32_t *request, uint32_t number) {
    __syncthreads(); // orders the rows of all threads before what this one writes
    if (threadIdx.x != 0)
        return;
    if (gridDim.x > 1) {
        __threadfence_system();
        if (atomicAdd(&state->arrived, 1u) + 1 != gridDim.x)
            return;
        state->arrived = 0; // the next post of the channel comes behind this kernel
    }
    state->number = number;
    store_release(request, number);
}

// Whether the answer to the last post is there; one thread of a block asks.
__device__ bool answered(State *at, const uint32_t *flag, uint32_t *error, uint64_t timeout_ns) {
    const State state = state_of(at);
    uint32_t answer = load_acquire(flag);
    const uint64_t began = now_ns();
    if (state.failed != 0)
        return false;
    while (static_cast<int32_t>(answer - state.number) < 0) {
        if (now_ns() - began > timeout_ns) {
            at->failed = 1;
            store_release(error, state.number != 0 ? state.number : 1u);
            return false;
        }
        __nanosleep(POLL_NS);
        answer = load_acquire(flag);
    }
    return true;
}

neo_cuda_status check(const neo_cuda_channel *channel) noexcept {
    NEO_NEED_SIZE(channel, "channel");
    NEO_NEED(channel->state != nullptr && channel->request != nullptr && channel->answer != nullptr &&
                 channel->error != nullptr,
             "channel: state, request, answer and error must not be NULL");
    NEO_NEED(aligned(channel->state, 16), "channel: state must be aligned to 16 bytes");
    NEO_NEED(aligned(channel->request, 4) && aligned(channel->answer, 4) && aligned(channel->error, 4),
             "channel: request, answer and error must be aligned to 4 bytes");
    return NEO_CUDA_OK;
}

neo_cuda_status check_rows(int32_t rows, int64_t row_bytes, int32_t ctas) noexcept {
    NEO_NEED(rows >= 0, "rows is %d, must not be negative", rows);
    NEO_NEED(rows * (row_bytes / 16) <= INT32_MAX, "rows is %d of %lld bytes each: too many", rows,
             static_cast<long long>(row_bytes));
    NEO_NEED(ctas >= 0 && ctas <= MAX_CTAS, "ctas is %d, must be 0 to %d", ctas, MAX_CTAS);
    return NEO_CUDA_OK;
}

// Bytes of a row, or between rows.
neo_cuda_status check_bytes(const char *name, int64_t bytes, int64_t least) noexcept {
    NEO_NEED(bytes >= least && bytes % 16 == 0, "%s is %lld, must be a multiple of 16, at least %lld", name,
             static_cast<long long>(bytes), static_cast<long long>(least));
    return NEO_CUDA_OK;
}

unsigned ctas_for(int32_t asked, int64_t bytes, int64_t of_cta) noexcept {
    return asked > 0 ? asked : static_cast<unsigned>(std::clamp<int64_t>(bytes / of_cta, 1, MAX_CTAS));
}

} // namespace
