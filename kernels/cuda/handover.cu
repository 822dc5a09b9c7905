// Rows to the host and back, with numbers in pinned memory instead of calls. See neo_cuda.h for the protocol.

#include "handover.cuh"

namespace {

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
    post_number(args.state, args.request, state.number + 1);
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

__global__ void __launch_bounds__(THREADS) await_rows(const __grid_constant__ Await args) {
    __shared__ bool there;
    const int rows = rows_of(args.rows_at, args.rows);
    if (threadIdx.x == 0)
        there = answered(args.state, args.answer, args.error, args.timeout_ns);
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

int64_t bytes_of_row(const neo_cuda_post &args) noexcept { return args.q_bytes + int64_t{2} * args.kv_bytes; }

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
