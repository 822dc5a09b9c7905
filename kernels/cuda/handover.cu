// Rows to the host and back, with numbers in pinned memory instead of calls. See neo_cuda.h for the protocol.

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

struct Post {
    State *state;
    uint32_t *request;
    const char *q, *k, *v;
    char *packed;
    int64_t q_stride, k_stride, v_stride, packed_stride;
    const int32_t *rows_at;
    int32_t rows, q_words, kv_words; // words of a row
};

__global__ void __launch_bounds__(THREADS) post_rows(const __grid_constant__ Post args) {
    const State state = state_of(args.state);
    const int rows = rows_of(args.rows_at, args.rows);
    if (state.failed != 0)
        return;
    const int q_end = args.q_words, k_end = q_end + args.kv_words;
    copy_words(
        rows, k_end + args.kv_words,
        [&](Place at) {
            const char *from = at.column < q_end   ? args.q + at.row * args.q_stride + at.column * 16
                               : at.column < k_end ? args.k + at.row * args.k_stride + (at.column - q_end) * 16
                                                   : args.v + at.row * args.v_stride + (at.column - k_end) * 16;
            return reinterpret_cast<const uint4 *>(from);
        },
        [&](Place at) { return reinterpret_cast<uint4 *>(args.packed + at.row * args.packed_stride + at.column * 16); });
    __syncthreads(); // orders the rows of all threads before what this one writes
    if (threadIdx.x != 0)
        return;
    if (gridDim.x > 1) {
        __threadfence_system();
        if (atomicAdd(&args.state->arrived, 1u) + 1 != gridDim.x)
            return;
        args.state->arrived = 0; // the next post of the channel comes behind this kernel
    }
    args.state->number = state.number + 1;
    store_release(args.request, state.number + 1);
}

struct Await {
    State *state;
    const uint32_t *answer;
    uint32_t *error;
    const char *packed;
    char *out;
    int64_t packed_stride, out_stride;
    const int32_t *rows_at;
    int32_t rows, row_words;
    uint64_t timeout_ns;
};

// Whether the answer to the last post is there.
__device__ bool answered(const Await &args) {
    const State state = state_of(args.state);
    uint32_t answer = load_acquire(args.answer);
    const uint64_t began = now_ns();
    if (state.failed != 0)
        return false;
    while (static_cast<int32_t>(answer - state.number) < 0) {
        if (now_ns() - began > args.timeout_ns) {
            args.state->failed = 1;
            store_release(args.error, state.number != 0 ? state.number : 1u);
            return false;
        }
        __nanosleep(POLL_NS);
        answer = load_acquire(args.answer);
    }
    return true;
}

__global__ void __launch_bounds__(THREADS) await_rows(const __grid_constant__ Await args) {
    __shared__ bool there;
    const int rows = rows_of(args.rows_at, args.rows);
    if (threadIdx.x == 0)
        there = answered(args);
    __syncthreads();
    if (!there)
        return;
    copy_words(
        rows, args.row_words,
        [&](Place at) {
            return reinterpret_cast<const uint4 *>(args.packed + at.row * args.packed_stride + at.column * 16);
        },
        [&](Place at) { return reinterpret_cast<uint4 *>(args.out + at.row * args.out_stride + at.column * 16); });
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

int64_t bytes_of_row(const neo_cuda_post &args) noexcept { return args.q_bytes + int64_t{2} * args.kv_bytes; }

unsigned ctas_for(int32_t asked, int64_t bytes, int64_t of_cta) noexcept {
    return asked > 0 ? asked : static_cast<unsigned>(std::clamp<int64_t>(bytes / of_cta, 1, MAX_CTAS));
}

neo_cuda_status check(const neo_cuda_post *args) noexcept {
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check(args->channel));
    NEO_TRY(check_bytes("q_bytes", args->q_bytes, 16));
    NEO_TRY(check_bytes("kv_bytes", args->kv_bytes, 16));
    NEO_TRY(check_rows(args->rows, bytes_of_row(*args), args->ctas));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    const int64_t strides[] = {args->q_stride, args->k_stride, args->v_stride};
    for (const int64_t stride : strides)
        NEO_TRY(check_bytes("a stride of q, k or v", stride, 0));
    NEO_TRY(check_bytes("packed_stride", args->packed_stride, bytes_of_row(*args)));
    NEO_NEED(args->q != nullptr && args->k != nullptr && args->v != nullptr && args->packed != nullptr,
             "q, k, v and packed must not be NULL");
    NEO_NEED(aligned(args->q, 16) && aligned(args->k, 16) && aligned(args->v, 16) && aligned(args->packed, 16),
             "q, k, v and packed must be aligned to 16 bytes");
    return NEO_CUDA_OK;
}

neo_cuda_status check(const neo_cuda_await *args) noexcept {
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check(args->channel));
    NEO_NEED(args->timeout_us > 0, "timeout_us is %lld, must be positive", static_cast<long long>(args->timeout_us));
    NEO_TRY(check_bytes("row_bytes", args->row_bytes, 16));
    NEO_TRY(check_rows(args->rows, args->row_bytes, args->ctas));
    if (args->rows == 0)
        return NEO_CUDA_OK;
    NEO_TRY(check_bytes("packed_stride", args->packed_stride, args->row_bytes));
    NEO_TRY(check_bytes("out_stride", args->out_stride, args->row_bytes));
    NEO_NEED(args->packed != nullptr && args->out != nullptr, "packed and out must not be NULL");
    NEO_NEED(aligned(args->packed, 16) && aligned(args->out, 16), "packed and out must be aligned to 16 bytes");
    return NEO_CUDA_OK;
}

} // namespace

extern "C" neo_cuda_status neo_cuda_post_rows(const neo_cuda_post *args, void *stream) {
    clear_error();
    NEO_TRY(check(args));
    const auto bytes = [](const void *p) { return static_cast<const char *>(p); };
    const Post kernel{reinterpret_cast<State *>(args->channel->state), args->channel->request,
                      bytes(args->q), bytes(args->k), bytes(args->v), static_cast<char *>(args->packed),
                      args->q_stride, args->k_stride, args->v_stride, args->packed_stride,
                      args->rows_at, args->rows, args->q_bytes / 16, args->kv_bytes / 16};
    const unsigned ctas = ctas_for(args->ctas, args->rows * bytes_of_row(*args), BYTES_OF_POST);
    launch_kernel(post_rows, ctas, THREADS, 0, static_cast<cudaStream_t>(stream), kernel);
    return launched("posting rows");
}

extern "C" neo_cuda_status neo_cuda_await_rows(const neo_cuda_await *args, void *stream) {
    clear_error();
    NEO_TRY(check(args));
    const neo_cuda_channel &channel = *args->channel;
    const Await kernel{reinterpret_cast<State *>(channel.state), channel.answer, channel.error,
                       static_cast<const char *>(args->packed), static_cast<char *>(args->out), args->packed_stride,
                       args->out_stride, args->rows_at, args->rows, args->row_bytes / 16,
                       static_cast<uint64_t>(args->timeout_us) * 1000};
    const unsigned ctas = ctas_for(args->ctas, int64_t{args->rows} * args->row_bytes, BYTES_OF_AWAIT);
    launch_kernel(await_rows, ctas, THREADS, 0, static_cast<cudaStream_t>(stream), kernel);
    return launched("awaiting rows");
}
