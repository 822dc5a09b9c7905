// Decode attention: cuts the batch into tasks, runs them on the pool, merges what was cut.
//
// Where a sequence is cut depends on its length alone, so sums are always taken in the same order: results depend
// neither on the thread count nor on the other sequences. Where that gives too few tasks for the threads, tasks are
// also cut by KV heads, which changes no sum at all. Short sequences are cut finer: with few of them, many threads
// would otherwise wait for the last of a few large tasks.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>

#include "check.h"
#include "error.h"
#include "kernels.h"
#include "pool.h"

namespace {

constexpr int32_t PIECE_TOKENS = 1024, SHORT_PIECE_TOKENS = 256; // K and V of a head of 128 in fp16: 512 and 128 KB
constexpr int32_t SHORT = 4096; // tokens of a sequence that is cut finer
constexpr int32_t SEGMENT_TOKENS = 64;  // of 32, 64 and 128: the smallest of the fastest
constexpr int64_t TASKS_PER_THREAD = 8;
constexpr float LOG2_E = 1.44269504f;

struct Piece {
    int32_t sequence;      // of the batch
    int32_t first;         // token
    int32_t tokens;        // as far as the sequence goes
    int32_t of;            // pieces of this sequence
    int64_t first_of_sequence; // index of the sequence's first piece
};

enum class Doing { ATTEND, READ };

struct Decode {
    const neo_cpu_decode &args;
    neo_cpu_pool &pool;
    Doing doing;
    int32_t group;             // query heads per KV head
    int32_t segment = 0;       // tokens
    bool whole = false;        // fetch all ahead, not only starts
    int32_t head_cuts = 1;     // tasks per piece
    int32_t heads_per_cut = 1; // KV heads
    int64_t tasks = 0;
    const Piece *pieces = nullptr;
    std::atomic<int32_t> *left = nullptr; // [batch][head_cuts]: pieces still to come
    float *sum_v = nullptr;               // [pieces][q_heads][head_dim]
    float *reference = nullptr;           // [pieces][q_heads]
    float *sum_w = nullptr;               // [pieces][q_heads]
    std::atomic<int64_t> next{0};
    std::atomic<int32_t> checksum{0}; // of a read
};

int32_t piece_tokens(int32_t length) { return length <= SHORT ? SHORT_PIECE_TOKENS : PIECE_TOKENS; }

int64_t pieces_of(int32_t length) { return (int64_t{length} + piece_tokens(length) - 1) / piece_tokens(length); }

char *out_row(const neo_cpu_decode &args, int32_t sequence, int32_t head) noexcept {
    return static_cast<char *>(args.out) +
           (sequence * args.out_stride + head * args.out_head_stride) * neo::bytes_of(args.io_dtype);
}

// Heads [first, end) of a sequence from all its pieces. `space` holds one head.
void merge(const Decode &decode, const Piece &piece, int32_t first, int32_t end, float *space) noexcept {
    const neo_cpu_decode &args = decode.args;
    const int32_t head_dim = args.cache->head_dim;
    for (int32_t h = first; h < end; h++) {
        const int64_t at = piece.first_of_sequence * args.q_heads + h;
        const float lse = neo_merge(decode.sum_v + at * head_dim, decode.reference + at, decode.sum_w + at, piece.of,
                                    args.q_heads, head_dim, space);
        neo::store(args.io_dtype, space, out_row(args, piece.sequence, h), head_dim);
        if (args.lse != nullptr)
            args.lse[int64_t{piece.sequence} * args.q_heads + h] = lse;
    }
}

// What the kernel needs to know of a task; sums go to the piece's place among the partial results.
NeoPiece describe(const Decode &decode, const Piece &piece, int64_t index, int32_t cut, float *scores) noexcept {
    const neo_cpu_decode &args = decode.args;
    const neo_cpu_cache &cache = *args.cache;
    const int32_t kv_first = cut * decode.heads_per_cut;
    const int64_t offset = kv_first * cache.head_stride * neo::bytes_of(cache.dtype);
    const int64_t at = index * args.q_heads + kv_first * decode.group;
    NeoPiece work;
    work.k = static_cast<const char *>(cache.k) + offset;
    work.v = static_cast<const char *>(cache.v) + offset;
    const int64_t row = args.sequences == nullptr ? piece.sequence : args.sequences[piece.sequence];
    work.blocks = args.block_tables + row * args.table_stride + piece.first / cache.block_size;
    work.q = scores + 4 * NEO_MAX_SEGMENT;
    work.sum_v = decode.sum_v + at * cache.head_dim;
    work.reference = decode.reference + at;
    work.sum_w = decode.sum_w + at;
    work.scratch = scores;
    work.block_stride = cache.block_stride;
    work.head_stride = cache.head_stride;
    work.tokens = std::min(piece.tokens, args.lengths[piece.sequence] - piece.first);
    work.segment = decode.segment;
    work.block_size = cache.block_size;
    work.head_dim = cache.head_dim;
    work.kv_heads = std::min(decode.heads_per_cut, cache.kv_heads - kv_first);
    work.group = decode.group;
    work.whole = decode.whole;
    return work;
}

void run_task(Decode &decode, int64_t task, float *space) noexcept {
    const neo_cpu_decode &args = decode.args;
    const neo_cpu_cache &cache = *args.cache;
    const int64_t index = task / decode.head_cuts;
    const int32_t cut = static_cast<int32_t>(task % decode.head_cuts);
    const Piece &piece = decode.pieces[index];
    const NeoPiece work = describe(decode, piece, index, cut, space);
    if (decode.doing != Doing::ATTEND) {
        decode.checksum.fetch_xor(neo_read(&work, static_cast<int32_t>(neo::bytes_of(cache.dtype))));
        return;
    }
    const int32_t first = cut * decode.heads_per_cut * decode.group;
    const int32_t heads = work.kv_heads * decode.group;
    float *q = space + 4 * NEO_MAX_SEGMENT;
    for (int32_t h = 0; h < heads; h++) {
        const char *row = static_cast<const char *>(args.q) +
                          (piece.sequence * args.q_stride + (first + h) * args.q_head_stride) *
                              neo::bytes_of(args.io_dtype);
        neo::load(args.io_dtype, row, q + h * cache.head_dim, cache.head_dim, args.scale * LOG2_E);
    }
    if (cache.dtype == NEO_CPU_FP16)
        neo_attend_f16(&work);
    else if (cache.dtype == NEO_CPU_BF16)
        neo_attend_bf16(&work);
    else
        neo_attend_f32(&work);

    // Whoever finishes the last piece of these heads merges them; the counter orders the others' writes before.
    auto &left = decode.left[int64_t{piece.sequence} * decode.head_cuts + cut];
    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1)
        merge(decode, piece, first, first + heads, q);
}

void work(void *context, int worker) noexcept {
    Decode &decode = *static_cast<Decode *>(context);
    float *space = decode.pool.per_worker[worker].get<float>();
    for (;;) {
        const int64_t task = decode.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= decode.tasks)
            return;
        run_task(decode, task, space);
    }
}

// A sequence without tokens has no piece: its rows are zeros.
void clear_row(const neo_cpu_decode &args, int32_t sequence) noexcept {
    const float zeros[256] = {};
    for (int32_t h = 0; h < args.q_heads; h++) {
        neo::store(args.io_dtype, zeros, out_row(args, sequence, h), args.cache->head_dim);
        if (args.lse != nullptr)
            args.lse[int64_t{sequence} * args.q_heads + h] = -std::numeric_limits<float>::infinity();
    }
}

// With one or two query heads to a KV head there is little to compute: the processor's window then reaches far
// enough ahead that asking for everything costs more than it gives. With more heads it pays (docs/cpu-attention.md).
void tune(Decode &decode) noexcept {
    const int prefetch = decode.pool.prefetch;
    decode.whole = prefetch == NEO_CPU_PREFETCH_AUTO ? decode.group > 2 : prefetch == NEO_CPU_PREFETCH_WHOLE;
    decode.segment = decode.pool.segment != 0 ? decode.pool.segment : SEGMENT_TOKENS;
}

void cut_by_heads(Decode &decode, int64_t pieces) noexcept {
    const int32_t kv_heads = decode.args.cache->kv_heads;
    const int64_t wanted = decode.pool.threads() == 1 ? 1 : TASKS_PER_THREAD * decode.pool.threads();
    const int64_t cuts = std::clamp<int64_t>((wanted + pieces - 1) / pieces, 1, kv_heads);
    decode.heads_per_cut = static_cast<int32_t>((kv_heads + cuts - 1) / cuts);
    decode.head_cuts = (kv_heads + decode.heads_per_cut - 1) / decode.heads_per_cut;
    decode.tasks = pieces * decode.head_cuts;
}

// Workspace and the list of pieces; false when there is no memory.
bool prepare(Decode &decode, int64_t pieces) noexcept {
    const neo_cpu_decode &args = decode.args;
    neo_cpu_pool &pool = decode.pool;
    const size_t rows = static_cast<size_t>(pieces) * args.q_heads;
    decode.sum_v = pool.shared.at_least<float>(rows * (args.cache->head_dim + 2));
    const size_t counters = static_cast<size_t>(args.batch) * decode.head_cuts;
    char *lists = pool.tasks.at_least<char>(pieces * sizeof(Piece) + counters * sizeof(std::atomic<int32_t>));
    if (decode.sum_v == nullptr || lists == nullptr)
        return false;
    const size_t space = 4 * NEO_MAX_SEGMENT + static_cast<size_t>(args.q_heads) * args.cache->head_dim;
    for (int32_t i = 0; i < pool.threads(); i++)
        if (pool.per_worker[i].at_least<float>(space) == nullptr)
            return false;
    decode.reference = decode.sum_v + rows * args.cache->head_dim;
    decode.sum_w = decode.reference + rows;
    Piece *piece = reinterpret_cast<Piece *>(lists);
    decode.pieces = piece;
    decode.left = reinterpret_cast<std::atomic<int32_t> *>(lists + pieces * sizeof(Piece));
    int64_t index = 0;
    for (int32_t i = 0; i < args.batch; i++) {
        const int32_t of = static_cast<int32_t>(pieces_of(args.lengths[i]));
        const int32_t tokens = piece_tokens(args.lengths[i]);
        for (int32_t p = 0; p < of; p++)
            *piece++ = Piece{i, p * tokens, tokens, of, index};
        index += of;
        for (int32_t c = 0; c < decode.head_cuts; c++)
            new (&decode.left[int64_t{i} * decode.head_cuts + c]) std::atomic<int32_t>(of);
    }
    return true;
}

neo_cpu_status run(neo_cpu_pool *pool, const neo_cpu_decode *args, Doing doing, int32_t *checksum) noexcept {
    neo::clear_error();
    if (pool == nullptr)
        return neo::fail(NEO_CPU_BAD_ARGUMENT, "pool must not be NULL");
    if (!neo::supported())
        return neo::fail(NEO_CPU_UNSUPPORTED, "this processor has none of the instruction sets built in");
    if (const neo_cpu_status status = neo::check(args))
        return status;
    int64_t pieces = 0;
    for (int32_t i = 0; i < args->batch; i++) {
        pieces += pieces_of(args->lengths[i]);
        if (args->lengths[i] == 0 && doing == Doing::ATTEND)
            clear_row(*args, i);
    }
    if (pieces == 0)
        return NEO_CPU_OK;
    std::lock_guard<std::mutex> lock(pool->mutex);
    Decode decode{*args, *pool, doing, args->q_heads / args->cache->kv_heads};
    tune(decode);
    cut_by_heads(decode, pieces);
    if (!prepare(decode, pieces))
        return neo::fail(NEO_CPU_NO_MEMORY, "no memory for the partial results of %lld pieces",
                         static_cast<long long>(pieces));
    pool->run(work, &decode);
    if (checksum != nullptr)
        *checksum = decode.checksum.load();
    return NEO_CPU_OK;
}

} // namespace

extern "C" neo_cpu_status neo_cpu_decode_attention(neo_cpu_pool *pool, const neo_cpu_decode *args) {
    return run(pool, args, Doing::ATTEND, nullptr);
}

extern "C" neo_cpu_status neo_cpu_read_cache(neo_cpu_pool *pool, const neo_cpu_decode *args,
                                             int32_t *checksum) {
    return run(pool, args, Doing::READ, checksum);
}
