// Decode attention: cuts batches into tasks, runs them on the pool, merges what was cut.
//
// Several batches (layers of relayed decodes) may share a run: a barrier after each, with few tasks in it, leaves the
// threads idle for a tenth of the time and more. Rows that are appended first are tasks of the same run, ahead of all
// attention; who attends to a batch waits for its rows.
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
#include <thread>

#include "append.h"
#include "check.h"
#include "decode.h"
#include "error.h"
#include "kernels.h"
#include "pool.h"
#include "thread.h"

namespace {

constexpr int32_t PIECE_TOKENS = 1024, SHORT_PIECE_TOKENS = 256; // K and V of a head of 128 in fp16: 512 and 128 KB
constexpr int32_t SHORT = 4096; // tokens of a sequence that is cut finer
constexpr int32_t SEGMENT_TOKENS = 32;  // of 32, 64 and 128: the smallest of the fastest
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
    const neo_cpu_append *append = nullptr;
    const neo_cpu_decode *args = nullptr;
    int32_t group = 0;         // query heads per KV head
    int32_t segment = 0;       // tokens
    bool whole = false;        // ask for all of K and V ahead, not only for starts
    int32_t head_cuts = 1;     // tasks per piece
    int32_t heads_per_cut = 1; // KV heads
    int64_t count = 0;         // pieces
    int64_t sequences = 0;     // that have tokens
    int64_t tasks = 0;
    const Piece *pieces = nullptr;
    std::atomic<int32_t> *left = nullptr; // [batch][head_cuts]: pieces still to come
    float *sum_v = nullptr;               // [pieces][q_heads][head_dim]
    float *reference = nullptr;           // [pieces][q_heads]
    float *sum_w = nullptr;               // [pieces][q_heads]
    std::atomic<int64_t> to_append{0};    // rows
    std::atomic<int64_t> open{0};         // rows to append, and outputs to write
};

// Batches that share a run of the pool.
struct Together {
    neo_cpu_pool &pool;
    Doing doing;
    int32_t count;
    neo::Done done;
    void *context;
    Decode decodes[neo::MAX_PARTS] = {};
    int64_t rows = 0;  // to append
    int64_t tasks = 0; // these, and pieces of attention
    std::atomic<int64_t> next{0};
    std::atomic<int32_t> checksum{0}; // of a read
    std::mutex order{};               // of `told`
    int32_t told = 0;                 // parts whose `done` was called
};

int32_t piece_tokens(int32_t length) { return length <= SHORT ? SHORT_PIECE_TOKENS : PIECE_TOKENS; }

int64_t pieces_of(int32_t length) { return (int64_t{length} + piece_tokens(length) - 1) / piece_tokens(length); }

char *out_row(const neo_cpu_decode &args, int32_t sequence, int32_t head) noexcept {
    return static_cast<char *>(args.out) +
           (sequence * args.out_stride + head * args.out_head_stride) * neo::bytes_of(args.io_dtype);
}

// Heads [first, end) of a sequence from all its pieces. `space` holds one head.
void merge(const Decode &decode, const Piece &piece, int32_t first, int32_t end, float *space) noexcept {
    const neo_cpu_decode &args = *decode.args;
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
    const neo_cpu_decode &args = *decode.args;
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

// Tells of the parts that are done, in their order.
void tell(Together &all) noexcept {
    if (all.done == nullptr)
        return;
    std::lock_guard<std::mutex> lock(all.order);
    while (all.told < all.count && all.decodes[all.told].open.load(std::memory_order_acquire) == 0)
        all.done(all.context, all.told++);
}

void close_one(Together &all, Decode &decode) noexcept {
    if (decode.open.fetch_sub(1, std::memory_order_acq_rel) == 1)
        tell(all);
}

void attend(Together &all, Decode &decode, int64_t task, float *space) noexcept {
    const neo_cpu_decode &args = *decode.args;
    const neo_cpu_cache &cache = *args.cache;
    const int64_t index = task / decode.head_cuts;
    const int32_t cut = static_cast<int32_t>(task % decode.head_cuts);
    const Piece &piece = decode.pieces[index];
    const NeoPiece work = describe(decode, piece, index, cut, space);
    if (all.doing != Doing::ATTEND) {
        all.checksum.fetch_xor(neo_read(&work, static_cast<int32_t>(neo::bytes_of(cache.dtype))));
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
    // Rows are appended by tasks that others have taken before: they are at it.
    for (long spins = 0; decode.to_append.load(std::memory_order_acquire) != 0; spins++) {
        neo::relax();
        if (spins > 100 * neo::SPINS_PER_LOOK)
            std::this_thread::yield(); // who appends lost its core: let it have this one
    }
    if (cache.dtype == NEO_CPU_FP16)
        neo_attend_f16(&work);
    else if (cache.dtype == NEO_CPU_BF16)
        neo_attend_bf16(&work);
    else
        neo_attend_f32(&work);

    // Whoever finishes the last piece of these heads merges them; the counter orders the others' writes before.
    auto &left = decode.left[int64_t{piece.sequence} * decode.head_cuts + cut];
    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        merge(decode, piece, first, first + heads, q);
        close_one(all, decode);
    }
}

void append(Together &all, int64_t row) noexcept {
    Decode *decode = all.decodes;
    for (; decode->append == nullptr || row >= decode->append->rows; decode++)
        row -= decode->append == nullptr ? 0 : decode->append->rows;
    neo::append_row(*decode->append, static_cast<int32_t>(row));
    decode->to_append.fetch_sub(1, std::memory_order_release);
    close_one(all, *decode);
}

void work(void *context, int worker) noexcept {
    Together &all = *static_cast<Together *>(context);
    float *space = all.pool.per_worker[worker].get<float>();
    Decode *decode = all.decodes;
    int64_t before = all.rows; // tasks before the batch's
    for (;;) {
        const int64_t task = all.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= all.tasks)
            return;
        if (task < all.rows) {
            append(all, task);
            continue;
        }
        for (; task - before >= decode->tasks; decode++)
            before += decode->tasks;
        attend(all, *decode, task - before, space);
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

void tune(Decode &decode, const neo_cpu_pool &pool) noexcept {
    decode.whole = pool.prefetch != NEO_CPU_PREFETCH_STARTS;
    decode.segment = pool.segment != 0 ? pool.segment : SEGMENT_TOKENS;
}

// `pieces`: of all batches in the run. The fewer cuts, the longer are the stretches of memory that a thread reads.
void cut_by_heads(Decode &decode, int threads, int64_t pieces) noexcept {
    const int32_t kv_heads = decode.args->cache->kv_heads;
    const int64_t wanted = threads == 1 ? 1 : TASKS_PER_THREAD * threads;
    const int64_t cuts = std::clamp<int64_t>((wanted + pieces - 1) / pieces, 1, kv_heads);
    decode.heads_per_cut = static_cast<int32_t>((kv_heads + cuts - 1) / cuts);
    decode.head_cuts = (kv_heads + decode.heads_per_cut - 1) / decode.heads_per_cut;
    decode.tasks = decode.count * decode.head_cuts;
}

// What a part has to do.
void look_at(Together &all, Decode &decode, const neo::Part &part) noexcept {
    if (part.append != nullptr) {
        decode.append = part.append;
        decode.to_append = part.append->rows;
        all.rows += part.append->rows;
    }
    if (part.decode == nullptr)
        return;
    const neo_cpu_decode &args = *part.decode;
    decode.args = &args;
    decode.group = args.q_heads / args.cache->kv_heads;
    tune(decode, all.pool);
    for (int32_t i = 0; i < args.batch; i++) {
        decode.count += pieces_of(args.lengths[i]);
        decode.sequences += args.lengths[i] != 0;
    }
}

// Tasks of all parts.
void plan(Together &all, const neo::Part *parts) noexcept {
    int64_t pieces = 0;
    for (int32_t i = 0; i < all.count; i++) {
        look_at(all, all.decodes[i], parts[i]);
        pieces += all.decodes[i].count;
    }
    all.tasks = all.rows;
    for (int32_t i = 0; i < all.count; i++) {
        Decode &decode = all.decodes[i];
        if (decode.count != 0)
            cut_by_heads(decode, all.pool.threads(), pieces);
        decode.open = decode.to_append.load() + decode.sequences * decode.head_cuts;
        all.tasks += decode.tasks;
    }
}

int64_t floats(const Decode &decode) noexcept {
    return decode.count == 0 ? 0 : decode.count * decode.args->q_heads * (decode.args->cache->head_dim + 2);
}

size_t list_bytes(const Decode &decode) noexcept {
    if (decode.count == 0)
        return 0;
    const size_t counters = static_cast<size_t>(decode.args->batch) * decode.head_cuts;
    const size_t bytes = decode.count * sizeof(Piece) + counters * sizeof(std::atomic<int32_t>);
    return (bytes + alignof(Piece) - 1) / alignof(Piece) * alignof(Piece);
}

void clear_rows(const Decode &decode) noexcept {
    for (int32_t i = 0; decode.args != nullptr && i < decode.args->batch; i++)
        if (decode.args->lengths[i] == 0)
            clear_row(*decode.args, i);
}

// A part's workspace and its list of pieces.
void lay_out(Decode &decode, float *sums, char *lists) noexcept {
    const neo_cpu_decode &args = *decode.args;
    const int64_t rows = decode.count * args.q_heads;
    decode.sum_v = sums;
    decode.reference = decode.sum_v + rows * args.cache->head_dim;
    decode.sum_w = decode.reference + rows;
    Piece *piece = reinterpret_cast<Piece *>(lists);
    decode.pieces = piece;
    decode.left = reinterpret_cast<std::atomic<int32_t> *>(lists + decode.count * sizeof(Piece));
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
}

// Workspace of all parts; false when there is no memory.
bool prepare(Together &all) noexcept {
    int64_t sums = 0, pieces = 0;
    size_t lists = 0, space = 0;
    for (int32_t i = 0; i < all.count; i++) {
        const Decode &decode = all.decodes[i];
        sums += floats(decode);
        lists += list_bytes(decode);
        pieces += decode.count;
        if (decode.count != 0)
            space = std::max(space, 4 * NEO_MAX_SEGMENT +
                                        static_cast<size_t>(decode.args->q_heads) * decode.args->cache->head_dim);
    }
    if (pieces == 0)
        return true;
    float *sum = all.pool.shared.at_least<float>(static_cast<size_t>(sums));
    char *list = all.pool.tasks.at_least<char>(lists);
    if (sum == nullptr || list == nullptr)
        return false;
    for (int32_t i = 0; i < all.pool.threads(); i++)
        if (all.pool.per_worker[i].at_least<float>(space) == nullptr)
            return false;
    for (int32_t i = 0; i < all.count; i++) {
        Decode &decode = all.decodes[i];
        if (decode.count != 0)
            lay_out(decode, sum, list);
        sum += floats(decode);
        list += list_bytes(decode);
    }
    return true;
}

neo_cpu_status check_all(const neo_cpu_pool *pool, const neo::Part *parts, int32_t count, int32_t *wrong) noexcept {
    neo::clear_error();
    *wrong = 0;
    for (int32_t i = 0; i < count; i++) {
        *wrong = i;
        if (parts[i].append == nullptr && parts[i].decode == nullptr)
            continue;
        if (pool == nullptr)
            return neo::fail(NEO_CPU_BAD_ARGUMENT, "pool must not be NULL");
        if (!neo::supported())
            return neo::fail(NEO_CPU_UNSUPPORTED, "this processor has none of the instruction sets built in");
        neo_cpu_status status = NEO_CPU_OK;
        if (parts[i].append != nullptr)
            status = neo::check(parts[i].append);
        if (status == NEO_CPU_OK && parts[i].decode != nullptr)
            status = neo::check(parts[i].decode);
        if (status != NEO_CPU_OK)
            return status;
    }
    return NEO_CPU_OK;
}

neo_cpu_status run(Together &all, const neo::Part *parts) noexcept {
    std::lock_guard<std::mutex> lock(all.pool.mutex);
    plan(all, parts);
    if (!prepare(all))
        return neo::fail(NEO_CPU_NO_MEMORY, "no memory for the partial results of %lld tasks",
                         static_cast<long long>(all.tasks));
    for (int32_t i = 0; i < all.count && all.doing == Doing::ATTEND; i++)
        clear_rows(all.decodes[i]);
    tell(all); // of those that have nothing to do
    if (all.tasks != 0)
        all.pool.run(work, &all);
    return NEO_CPU_OK;
}

neo_cpu_status run_one(neo_cpu_pool *pool, const neo_cpu_decode *args, Doing doing, int32_t *checksum) noexcept {
    const neo::Part part{nullptr, args};
    int32_t wrong = 0;
    if (pool == nullptr || args == nullptr) {
        neo::clear_error();
        return pool == nullptr ? neo::fail(NEO_CPU_BAD_ARGUMENT, "pool must not be NULL") : neo::check(args);
    }
    neo_cpu_status status = check_all(pool, &part, 1, &wrong);
    if (status != NEO_CPU_OK)
        return status;
    Together all{*pool, doing, 1, nullptr, nullptr};
    status = run(all, &part);
    if (status == NEO_CPU_OK && checksum != nullptr)
        *checksum = all.checksum.load();
    return status;
}

} // namespace

neo_cpu_status neo::attend_all(neo_cpu_pool *pool, const Part *parts, int32_t count, Done done, void *context,
                               int32_t *wrong) noexcept {
    if (const neo_cpu_status status = check_all(pool, parts, count, wrong))
        return status;
    if (pool == nullptr) { // nobody has anything to do
        for (int32_t i = 0; done != nullptr && i < count; i++)
            done(context, i);
        return NEO_CPU_OK;
    }
    Together all{*pool, Doing::ATTEND, count, done, context};
    return run(all, parts);
}

int64_t neo::partial_bytes(const neo_cpu_decode *decode) noexcept {
    if (decode == nullptr || decode->lengths == nullptr || decode->cache == nullptr)
        return 0;
    int64_t pieces = 0;
    for (int32_t i = 0; i < decode->batch; i++)
        pieces += pieces_of(std::max(decode->lengths[i], 0));
    const int64_t floats = int64_t{std::clamp(decode->q_heads, 0, 1 << 16)} * (int64_t{decode->cache->head_dim} + 2);
    return std::min<int64_t>(pieces, 1 << 20) * floats * static_cast<int64_t>(sizeof(float));
}

extern "C" neo_cpu_status neo_cpu_decode_attention(neo_cpu_pool *pool, const neo_cpu_decode *args) {
    return run_one(pool, args, Doing::ATTEND, nullptr);
}

extern "C" neo_cpu_status neo_cpu_read_cache(neo_cpu_pool *pool, const neo_cpu_decode *args,
                                             int32_t *checksum) {
    return run_one(pool, args, Doing::READ, checksum);
}
