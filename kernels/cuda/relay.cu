// Rows of relayed decodes change places between a layer's PRE and its POST. See neo_cuda.h.

#include "handover.cuh"

namespace {

struct Relay {
    State *state;
    uint32_t *request, *error;
    const uint32_t *answer;
    const char *q, *k, *v, *came, *next_cos, *next_sin;
    char *packed, *out, *hidden, *kept, *cos, *sin;
    int64_t q_stride, k_stride, v_stride, packed_stride, came_stride, out_stride, hidden_stride, kept_stride;
    int64_t angle_stride, next_stride;
    int32_t rows, q_words, kv_words, hidden_words, angle_words; // words of a row
    uint64_t timeout_ns;
};

// Rows of two memories change places.
__device__ void exchange(const Relay &args) {
    const unsigned words = static_cast<unsigned>(args.rows) * static_cast<unsigned>(args.hidden_words);
    for (unsigned word = blockIdx.x * THREADS + threadIdx.x; word < words; word += gridDim.x * THREADS) {
        const unsigned row = word / static_cast<unsigned>(args.hidden_words);
        const unsigned column = word - row * static_cast<unsigned>(args.hidden_words);
        auto *mine = reinterpret_cast<uint4 *>(args.hidden + row * args.hidden_stride + column * 16);
        auto *kept = reinterpret_cast<uint4 *>(args.kept + row * args.kept_stride + column * 16);
        const uint4 leaves = *mine, comes = *kept;
        *mine = comes;
        *kept = leaves;
    }
}

__global__ void __launch_bounds__(THREADS) relay_rows(const __grid_constant__ Relay args) {
    __shared__ bool there;
    __shared__ uint32_t number;
    exchange(args);
    const auto row_of = [](const char *from, Place at, int64_t stride, int first) {
        return reinterpret_cast<const uint4 *>(from + at.row * stride + (at.column - first) * 16);
    };
    const auto row_to = [](char *to, Place at, int64_t stride, int first) {
        return reinterpret_cast<uint4 *>(to + at.row * stride + (at.column - first) * 16);
    };
    copy_words(
        args.rows, 2 * args.angle_words,
        [&](Place at) {
            return at.column < args.angle_words ? row_of(args.next_cos, at, args.next_stride, 0)
                                                : row_of(args.next_sin, at, args.next_stride, args.angle_words);
        },
        [&](Place at) {
            return at.column < args.angle_words ? row_to(args.cos, at, args.angle_stride, 0)
                                                : row_to(args.sin, at, args.angle_stride, args.angle_words);
        });
    if (threadIdx.x == 0) {
        there = answered(args.state, args.answer, args.error, args.timeout_ns);
        number = state_of(args.state).number;
    }
    __syncthreads();
    if (!there)
        return;
    copy_words(
        args.rows, args.q_words, [&](Place at) { return row_of(args.came, at, args.came_stride, 0); },
        [&](Place at) { return row_to(args.out, at, args.out_stride, 0); });
    // The host has read what it was sent before: it has answered.
    const int q_end = args.q_words, k_end = q_end + args.kv_words;
    copy_words(
        args.rows, k_end + args.kv_words,
        [&](Place at) {
            return at.column < q_end   ? row_of(args.q, at, args.q_stride, 0)
                   : at.column < k_end ? row_of(args.k, at, args.k_stride, q_end)
                                       : row_of(args.v, at, args.v_stride, k_end);
        },
        [&](Place at) { return row_to(args.packed, at, args.packed_stride, 0); });
    post_number(args.state, args.request, number + 1);
}

neo_cuda_status check(const neo_cuda_relay *args) noexcept {
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check(args->channel));
    NEO_NEED(args->timeout_us > 0, "timeout_us is %lld, must be positive", static_cast<long long>(args->timeout_us));
    NEO_TRY(check_bytes("q_bytes", args->q_bytes, 16));
    NEO_TRY(check_bytes("kv_bytes", args->kv_bytes, 16));
    NEO_TRY(check_bytes("hidden_bytes", args->hidden_bytes, 16));
    NEO_TRY(check_bytes("angle_bytes", args->angle_bytes, 0));
    const int64_t packed_bytes = args->q_bytes + 2 * int64_t{args->kv_bytes};
    NEO_TRY(check_rows(args->rows, args->hidden_bytes + packed_bytes + 2 * int64_t{args->angle_bytes}, args->ctas));
    const int64_t strides[] = {args->q_stride, args->k_stride, args->v_stride};
    for (const int64_t stride : strides)
        NEO_TRY(check_bytes("a stride of q, k or v", stride, 0));
    NEO_TRY(check_bytes("packed_stride", args->packed_stride, packed_bytes));
    NEO_TRY(check_bytes("came_stride", args->came_stride, args->q_bytes));
    NEO_TRY(check_bytes("out_stride", args->out_stride, args->q_bytes));
    NEO_TRY(check_bytes("hidden_stride", args->hidden_stride, args->hidden_bytes));
    NEO_TRY(check_bytes("kept_stride", args->kept_stride, args->hidden_bytes));
    NEO_TRY(check_bytes("angle_stride", args->angle_stride, args->angle_bytes));
    NEO_TRY(check_bytes("next_stride", args->next_stride, args->angle_bytes));
    const void *needed[] = {args->q, args->k, args->v, args->packed, args->came, args->out, args->hidden, args->kept};
    for (const void *pointer : needed)
        NEO_NEED(pointer != nullptr && aligned(pointer, 16), "rows must not be NULL, and aligned to 16 bytes");
    const void *angles[] = {args->cos, args->sin, args->next_cos, args->next_sin};
    for (const void *pointer : angles)
        NEO_NEED(args->angle_bytes == 0 || (pointer != nullptr && aligned(pointer, 16)),
                 "angles must not be NULL, and aligned to 16 bytes");
    return NEO_CUDA_OK;
}

} // namespace

extern "C" neo_cuda_status neo_cuda_relay_rows(const neo_cuda_relay *args, void *stream) {
    clear_error();
    NEO_TRY(check(args));
    const auto from = [](const void *p) { return static_cast<const char *>(p); };
    const auto to = [](void *p) { return static_cast<char *>(p); };
    const neo_cuda_channel &channel = *args->channel;
    const Relay kernel{reinterpret_cast<State *>(channel.state), channel.request, channel.error, channel.answer,
                       from(args->q), from(args->k), from(args->v), from(args->came),
                       from(args->next_cos), from(args->next_sin),
                       to(args->packed), to(args->out), to(args->hidden), to(args->kept), to(args->cos), to(args->sin),
                       args->q_stride, args->k_stride, args->v_stride, args->packed_stride, args->came_stride,
                       args->out_stride, args->hidden_stride, args->kept_stride, args->angle_stride, args->next_stride,
                       args->rows, args->q_bytes / 16, args->kv_bytes / 16, args->hidden_bytes / 16,
                       args->angle_bytes / 16, static_cast<uint64_t>(args->timeout_us) * 1000};
    const int64_t bytes = args->rows * (args->q_bytes + 2 * int64_t{args->kv_bytes});
    launch_kernel(relay_rows, ctas_for(args->ctas, bytes, BYTES_OF_AWAIT), THREADS, 0, static_cast<cudaStream_t>(stream),
                  kernel);
    return launched("relaying rows");
}
