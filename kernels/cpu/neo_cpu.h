/*
 * neo's kernels for the CPU: decode attention over a paged KV cache, appending to that cache, copying its blocks,
 * and threads that run such work in order.
 *
 * Plain C, meant for ctypes and for callbacks. Nothing here throws, aborts or prints. Every function that can
 * fail returns a neo_cpu_status; neo_cpu_last_error() then explains it. Structs begin with `size`, which the
 * caller sets to sizeof: a caller built against another version of a struct is refused, not misread.
 *
 * Layout of the cache of one layer. A block holds `block_size` tokens of every KV head. For block b, head h:
 *     K: [head_dim][block_size] at k + b * block_stride + h * head_stride
 *     V: [block_size][head_dim] at v + b * block_stride + h * head_stride
 * in elements. Each of the two is contiguous. Fastest is K and V of a head side by side and the heads of a
 * block one after the other ([block][head][K, V], head_stride = 2 * head_dim * block_size,
 * block_stride = kv_heads * head_stride, v = k + head_dim * block_size): a block is then one run of memory.
 */
#ifndef NEO_CPU_H
#define NEO_CPU_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define NEO_CPU_ABI 3

typedef enum neo_cpu_status {
    NEO_CPU_OK = 0,
    NEO_CPU_BAD_ARGUMENT = 1, /* null pointer, size, stride, data type, block number, ... */
    NEO_CPU_NO_MEMORY = 2,    /* workspace or threads could not be had */
    NEO_CPU_UNSUPPORTED = 3,  /* this processor has none of the instruction sets built in */
    NEO_CPU_TIMEOUT = 4,      /* a wait ended before the job did */
    NEO_CPU_FULL = 5,         /* the worker has as many jobs as it can hold */
    NEO_CPU_DEPENDENCY = 6,   /* not run: a job it comes after failed */
    NEO_CPU_NO_FLAG = 7,      /* not run: its wait_flag (or a hand-over's request) was not set in time */
    NEO_CPU_CANCELLED = 8     /* not run: the worker was destroyed first */
} neo_cpu_status;

typedef enum neo_cpu_dtype { NEO_CPU_FP32 = 0, NEO_CPU_FP16 = 1, NEO_CPU_BF16 = 2 } neo_cpu_dtype;

/* NEO_CPU_ABI of the library. */
int32_t neo_cpu_abi(void);
/* "3.0.0": the library's version. */
const char *neo_cpu_version(void);
/* What dispatch chose on this machine: "avx512", "avx2", "neon" or "unsupported". */
const char *neo_cpu_target(void);
/* Why the last call on this thread failed; "" if it did not. Valid until this thread's next call. */
const char *neo_cpu_last_error(void);

/* ---- threads ---- */

typedef struct neo_cpu_pool neo_cpu_pool;

/* How decode attention asks for memory before it needs it; it changes speed only. */
typedef enum neo_cpu_prefetch {
    NEO_CPU_PREFETCH_AUTO = 0,   /* the library's choice */
    NEO_CPU_PREFETCH_STARTS = 1, /* the first 2 KB of the blocks that come next; the hardware does the rest */
    NEO_CPU_PREFETCH_WHOLE = 2   /* all of K and V as well, into both levels of cache */
} neo_cpu_prefetch;

typedef struct neo_cpu_pool_options {
    size_t size;
    int32_t threads;      /* that work, the calling thread included: 1 starts none */
    int32_t n_cores;      /* length of `cores`; 0: threads run where the system puts them */
    const int32_t *cores; /* core of worker i is cores[i]; [0] is the caller's and is left alone */
    int32_t spin_us;      /* how long an idle worker spins before it sleeps */
    int32_t prefetch;     /* neo_cpu_prefetch */
    int32_t segment;      /* tokens whose scores are taken together: 32, 64 or 128; 0: the library's choice */
} neo_cpu_pool_options;

/* A pool may be used from any thread; calls that share one run one after the other. */
neo_cpu_status neo_cpu_pool_create(const neo_cpu_pool_options *options, neo_cpu_pool **pool);
/* The pool must be idle. NULL is allowed. */
void neo_cpu_pool_destroy(neo_cpu_pool *pool);
int32_t neo_cpu_pool_threads(const neo_cpu_pool *pool);
/* Between begin and end idle workers spin without limit (waking costs about 0.2 us, not 5 to 70). Calls nest. */
neo_cpu_status neo_cpu_pool_begin_step(neo_cpu_pool *pool);
neo_cpu_status neo_cpu_pool_end_step(neo_cpu_pool *pool);

/* ---- the cache of one layer ---- */

typedef struct neo_cpu_cache {
    size_t size;
    void *k;
    void *v;
    int64_t block_stride; /* elements, at least kv_heads * head_stride unless there is one block */
    int64_t head_stride;  /* elements, at least head_dim * block_size unless there is one head */
    int32_t num_blocks;
    int32_t kv_heads;
    int32_t head_dim;   /* a multiple of 16, 16 to 256 */
    int32_t block_size; /* 8, 16 or 32 */
    int32_t dtype;      /* neo_cpu_dtype */
} neo_cpu_cache;

/* ---- decode attention ---- */

/*
 * out[i][h] = softmax(scale * q[i][h] . K) V over the first lengths[i] tokens of the sequence in row sequences[i]
 * (NULL: row i) of the block tables, KV head h / (q_heads / kv_heads). All sums are in fp32. A sequence of length 0 gives zeros (and lse -infinity).
 * Results do not depend on the thread count, nor on which other sequences are in the batch.
 * Nothing is read of blocks that the first lengths[i] tokens do not touch, nor of later table entries.
 * What is left over in the last block may be anything, NaN included.
 */
typedef struct neo_cpu_decode {
    size_t size;
    const neo_cpu_cache *cache;
    const void *q; /* [batch][q_heads][head_dim] of io_dtype, strides below, last axis contiguous */
    void *out;     /* likewise; must not overlap q or the cache */
    float *lse;    /* NULL, or [batch][q_heads]: natural log of the sum of exp(scores) */
    int64_t q_stride, q_head_stride, out_stride, out_head_stride; /* elements */
    const int32_t *block_tables; /* [n_sequences][>= ceil(lengths[i] / block_size)] */
    int64_t table_stride;        /* entries */
    const int32_t *sequences;    /* NULL or [batch]; two queries may name the same one */
    const int32_t *lengths;      /* [batch], tokens, >= 0 */
    int32_t batch;
    int32_t n_sequences;
    int32_t q_heads;  /* a multiple of kv_heads */
    int32_t io_dtype; /* neo_cpu_dtype of q and out: any, whatever the cache's */
    float scale;      /* finite */
} neo_cpu_decode;

neo_cpu_status neo_cpu_decode_attention(neo_cpu_pool *pool, const neo_cpu_decode *args);

/*
 * Reads the bytes that neo_cpu_decode_attention would read, with the same threads in the same order, and computes
 * nothing: the speed to hold the kernel against. q and out are not used. checksum (NULL is allowed) receives a
 * number that depends on every byte.
 */
neo_cpu_status neo_cpu_read_cache(neo_cpu_pool *pool, const neo_cpu_decode *args, int32_t *checksum);

/* ---- append ---- */

/*
 * Writes row i of k and v as token positions[i] of sequence sequences[i] (NULL: sequence i), rounding to the
 * cache's type. No two rows may name the same token. Either all rows are written or, on an error, none.
 */
typedef struct neo_cpu_append {
    size_t size;
    const neo_cpu_cache *cache;
    const void *k; /* [rows][kv_heads][head_dim] of io_dtype; the last two axes contiguous */
    const void *v;
    int64_t k_stride, v_stride;  /* elements between rows */
    const int32_t *block_tables; /* [n_sequences][>= positions / block_size + 1] */
    int64_t table_stride;        /* entries */
    const int32_t *sequences;    /* NULL or [rows] */
    const int32_t *positions;    /* [rows], >= 0, less than table_stride * block_size */
    int32_t rows;
    int32_t n_sequences;
    int32_t io_dtype; /* NEO_CPU_FP32 or the cache's */
} neo_cpu_append;

neo_cpu_status neo_cpu_append_kv(neo_cpu_pool *pool, const neo_cpu_append *args);

/* ---- copying blocks ---- */

/*
 * Block dst_blocks[i] of one memory becomes block src_blocks[i] of another, or of the same. A block is block_bytes
 * long; block b lies at b * block_bytes. No block may be written twice, nor be both read and written.
 */
typedef struct neo_cpu_copy {
    size_t size;
    const void *src;
    void *dst;
    int64_t block_bytes;
    const int32_t *src_blocks; /* [count], 0 to src_count - 1 */
    const int32_t *dst_blocks; /* [count], 0 to dst_count - 1 */
    int32_t src_count;         /* blocks in each memory */
    int32_t dst_count;
    int32_t count;
} neo_cpu_copy;

/* With pool NULL the calling thread copies alone. Either all blocks are copied or, on an error, none. */
neo_cpu_status neo_cpu_copy_blocks(neo_cpu_pool *pool, const neo_cpu_copy *args);

/* ---- hand-over ---- */

/*
 * The CPU attention of one sub-batch in all layers of a step, which a device asks for layer by layer. The device writes
 * q, k and v of a layer where `append` and `decode` read them and sets *request; the CPU appends, attends, and sets
 * *answer once the output is where the device reads it. Both are flags as of a job (below), in memory that both sides
 * see (neo_cuda.h tells the device's half). Layer l is asked for by the number first + l and answered with it.
 *
 * `append` and `decode` are those of layer 0; layer l has the block tables that lie l * layer_stride entries further
 * on. All else, the cache with its layer-blocks above all, is the same in every layer. They are read once, when the
 * hand-over begins, but what they point to is read in every layer.
 */
typedef struct neo_cpu_stage {
    size_t size;
    const neo_cpu_append *append;     /* or NULL */
    const neo_cpu_decode *decode;     /* or NULL */
    const volatile uint32_t *request; /* or NULL: nothing to wait for */
    volatile uint32_t *answer;        /* or NULL */
    uint32_t first;
    int64_t layer_stride; /* entries of the block tables */
} neo_cpu_stage;

/*
 * Layer by layer the stages in their order: with two sub-batches, CPU attention of batch 0, then of batch 1. Where each
 * layer has rows, block tables and a channel of its own, as with relayed decodes, the layers are stages of one `layer`;
 * rows of a layer that do not lie side by side are then several, the first with the request and the last with the answer.
 * Stages of a layer that have all been asked for when their turn comes (or need not be: request NULL) are served in one
 * run of the threads. So none may append or write what another reads, appends or writes, and what their arguments point
 * to, lengths and tables too, must be valid when the first of them begins. Answers are set in the stages' order, each as
 * soon as it is there. An error in one of them keeps the others of the run from being served.
 */
typedef struct neo_cpu_handover {
    size_t size;
    const neo_cpu_stage *stages;
    int32_t n_stages; /* 0 to 65536 */
    int32_t layers;   /* 0 or more */
    int64_t *times;   /* NULL, or [layers][n_stages][2]: out: CLOCK_MONOTONIC in ns when the request was there, and
                         the stages before were done, and when the answer was set; untouched where it did not come to
                         that */
} neo_cpu_handover;

/* ---- jobs ---- */

/*
 * Work that another thread may run. A flag is a number that only grows (and may wrap around), in memory that a device
 * may read and write: a job with a wait_flag starts once (int32_t)(*wait_flag - wait_value) >= 0, and done_flag is
 * set to done_value when the job has ended, whether or not it succeeded or was run at all.
 */
typedef struct neo_cpu_job {
    size_t size;
    neo_cpu_pool *pool;           /* NULL: the worker's */
    const neo_cpu_append *append; /* first, unless NULL */
    const neo_cpu_decode *decode; /* then, unless NULL */
    const neo_cpu_copy *copy;     /* then, unless NULL */
    const neo_cpu_handover *handover;   /* last, unless NULL. If the job fails or is not run, all answers are set to their
                                           last number, so that no device waits for them: its step has then failed */
    const volatile uint32_t *wait_flag; /* or NULL */
    volatile uint32_t *done_flag;       /* or NULL */
    uint32_t wait_value;
    uint32_t done_value;
    int64_t start_ns;    /* out: CLOCK_MONOTONIC when it began, with all it waits for there */
    int64_t end_ns;      /* out: likewise, when it ended */
    int32_t status;      /* out: neo_cpu_status */
    char message[252];   /* out: "" or why it failed */
} neo_cpu_job;

/* Has the shape of a host callback (cudaLaunchHostFunc, ...). Waits for wait_flag for 10 s at most. */
void neo_cpu_run(void *job);

/* ---- workers ---- */

/* A thread of its own that runs jobs in the order in which they were submitted. */
typedef struct neo_cpu_worker neo_cpu_worker;

typedef struct neo_cpu_worker_options {
    size_t size;
    neo_cpu_pool *pool;      /* for jobs that name none; outlives the worker. NULL: there is none */
    int64_t flag_timeout_us; /* how long a job waits for its wait_flag before it fails */
    int32_t core;            /* where the thread runs; -1: where the system puts it */
    int32_t spin_us;         /* how long it, and who waits for it, spins before sleeping; -1: never sleeps */
} neo_cpu_worker_options;

/* A job of a worker. Tickets count from 1. */
typedef struct neo_cpu_after {
    neo_cpu_worker *worker;
    int64_t ticket;
} neo_cpu_after;

neo_cpu_status neo_cpu_worker_create(const neo_cpu_worker_options *options, neo_cpu_worker **worker);
/*
 * Ends the thread. A job that runs is finished, all later ones fail with NEO_CPU_CANCELLED. No other call on this
 * worker may be going on; jobs of other workers may still come after its jobs. NULL is allowed.
 */
void neo_cpu_worker_destroy(neo_cpu_worker *worker);

/*
 * Queues a job, to be run once all in `after` (of any worker, this one too) have ended; if one of those failed, it is then
 * not run and fails with NEO_CPU_DEPENDENCY. `after` is copied; the job and all it points to must stay until it has
 * ended. Refused with NEO_CPU_FULL while 4096 jobs have not ended. ticket may be NULL. From any thread.
 */
neo_cpu_status neo_cpu_worker_submit(neo_cpu_worker *worker, neo_cpu_job *job, const neo_cpu_after *after,
                                     int32_t n_after, int64_t *ticket);
/*
 * Waits until a job has ended, for timeout_us at most (negative: without limit). NEO_CPU_TIMEOUT if it has not; else
 * the job's status, with its message in neo_cpu_last_error(). A ticket may be waited for again, from any thread; the
 * last 4096 failures of a worker are remembered.
 */
neo_cpu_status neo_cpu_worker_wait(neo_cpu_worker *worker, int64_t ticket, int64_t timeout_us);
/* The last ticket whose job has ended (all before it have too); 0 if none. */
int64_t neo_cpu_worker_finished(const neo_cpu_worker *worker);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif
#endif
