/*
 * neo's kernels for NVIDIA GPUs: decode attention over a paged KV cache, what stands between the matrix products of
 * a layer, copies of KV blocks between the tiers, and the hand-over of rows to the host and back.
 *
 * Plain C, meant for ctypes and for C launch loops. Nothing here throws, aborts, prints, allocates or waits for the
 * device. Every function that launches takes a `stream` (a cudaStream_t), is ordered by it alone and can be captured
 * in a CUDA graph: what a graph bakes in are the pointers and numbers in the arguments; what changes from replay to
 * replay (tables, slots, lengths, positions, lists of blocks, counts) lies in memory that the kernels read. Every
 * function that can fail returns a neo_cuda_status; neo_cuda_last_error() then explains it. Structs begin with
 * `size`, which the caller sets to sizeof. Arguments are checked before anything is launched; what lies in device
 * memory (block numbers, slots, positions) cannot be and is trusted.
 *
 * A call runs on the current device of the calling thread. Pointers are to device memory unless said otherwise;
 * "pinned" is host memory that the device can address (cudaHostAlloc or cudaHostRegister, mapped).
 *
 * Layout of the cache: that of neo_cpu.h, on both tiers, so that a copy between them is a plain copy. One flat array
 * of layer-blocks, [block][kv_head][K: [head_dim][block_size] | V: [block_size][head_dim]]. The K and V that one KV
 * head has in a block are one run of memory (8 KiB for 16 tokens of 128 in 16 bits), and the tensor cores take both
 * through ldmatrix.trans: transposed K planes cost the GPU nothing.
 */
#ifndef NEO_CUDA_H
#define NEO_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define NEO_CUDA_ABI 6

typedef enum neo_cuda_status {
    NEO_CUDA_OK = 0,
    NEO_CUDA_BAD_ARGUMENT = 1, /* null pointer, size, stride, data type, ... */
    NEO_CUDA_DEVICE = 2,       /* the CUDA runtime refused; the message has its words */
    NEO_CUDA_UNSUPPORTED = 3   /* this device cannot do it */
} neo_cuda_status;

/* As neo_cpu_dtype. */
typedef enum neo_cuda_dtype { NEO_CUDA_FP32 = 0, NEO_CUDA_FP16 = 1, NEO_CUDA_BF16 = 2 } neo_cuda_dtype;

/* NEO_CUDA_ABI of the library. */
int32_t neo_cuda_abi(void);
/* "2.0.0": the library's version. */
const char *neo_cuda_version(void);
/* Why the last call on this thread failed; "" if it did not. Valid until this thread's next call. */
const char *neo_cuda_last_error(void);

typedef struct neo_cuda_device_info {
    size_t size;
    int32_t capability; /* 90 for 9.0 */
    int32_t multiprocessors;
    int32_t shared_bytes; /* shared memory of a multiprocessor */
    int32_t l2_bytes;
    int32_t runtime; /* CUDA runtime built in, 13000 for 13.0 */
    int32_t driver;  /* newest CUDA runtime the driver serves; 0: no driver */
} neo_cuda_device_info;

/* Of the current device. NEO_CUDA_DEVICE where there is none. */
neo_cuda_status neo_cuda_describe(neo_cuda_device_info *info);

/*
 * From capability 9.0 on, attention, norm, SiLU and rotary embedding are launched so that they begin before the kernel
 * ahead of them on the stream has ended (programmatic dependent launch, in graphs too): they look up what does not
 * depend on it, then wait until it has ended. 0 turns that off, another number on, for all launches from then on; below
 * 0 nothing changes. Returns what it was. At first it is on, unless the environment has NEO_CUDA_PDL=0.
 */
int32_t neo_cuda_overlap(int32_t on);

typedef struct neo_cuda_cache {
    size_t size;
    void *data; /* aligned to 16 bytes */
    int32_t num_blocks;
    int32_t kv_heads;
    int32_t head_dim;   /* 64, 80, 96, 128 or 256 (FP32: a multiple of 16 up to 256) */
    int32_t block_size; /* 8, 16 or 32 */
    int32_t dtype;      /* neo_cuda_dtype */
} neo_cuda_cache;

/* ---- decode attention ---- */

/*
 * out[i][h] = softmax(scale * q[i][h] . K) V over the first lengths[i] tokens of row slots[i] (NULL: row i) of the
 * block table. A row of length 0 (padding of a captured batch) gives zeros. What is left over in a last block may be
 * anything, NaN included; later table entries are not read.
 *
 * 16-bit caches use tensor cores: weights are rounded to the cache's type, sums are in fp32. The work of all rows is
 * dealt out in equal runs of 16-token tiles to as many warps as the device holds at once; what was cut is merged by
 * the warp that comes last. How it is dealt out is computed on the device by neo_cuda_decode_plan, once for all
 * layers that share rows and lengths; both calls take the same workspace and the same geometry. Sums depend on where
 * the work was cut: the same batch gives the same bits, another batch may differ by rounding. FP32 caches (and BF16 on
 * capability 7.5, which has no such tensor cores) take a plain kernel, one block a row and query head, whose results
 * depend on the row alone; it needs neither plan nor workspace.
 */
typedef struct neo_cuda_decode {
    size_t size;
    const neo_cuda_cache *cache;
    const void *q; /* [rows][q_heads][head_dim] of the cache's type, strides below, last axis contiguous */
    void *out;     /* likewise */
    int64_t q_stride, q_head_stride, out_stride, out_head_stride; /* elements, even */
    const int32_t *block_tables; /* [slots][table_stride], of one layer */
    int64_t table_stride;        /* entries */
    const int32_t *slots;        /* NULL or [rows] */
    const int32_t *lengths;      /* [rows], tokens, the new one included */
    void *workspace;             /* neo_cuda_decode_workspace bytes, aligned to 16; one call at a time */
    size_t workspace_bytes;
    int32_t rows;
    int32_t q_heads; /* a multiple of kv_heads */
    int32_t ctas;    /* thread blocks of 4 warps; 0: the library's choice. Of plan and attention alike */
    int32_t stages;  /* tiles that a warp has in flight or in use; 0: the library's choice; 1 to 8 */
    float scale;     /* finite */
    /*
     * Not 0: tables, slots, lengths, the plan and all of the cache but the last token of each row were there before the
     * kernel ahead on the stream began. They are then read while that one still runs.
     */
    int32_t early;
} neo_cuda_decode;

/* Bytes of workspace that these arguments need (q, out, tables, slots, lengths, workspace may be NULL). */
neo_cuda_status neo_cuda_decode_workspace(const neo_cuda_decode *args, size_t *bytes);
/* Before the attention of a step's first layer. Reads lengths (q, out, tables, slots may be NULL). */
neo_cuda_status neo_cuda_decode_plan(const neo_cuda_decode *args, void *stream);
neo_cuda_status neo_cuda_decode_attention(const neo_cuda_decode *args, void *stream);

/* ---- between the matrix products ---- */

/*
 * hidden += delta (unless delta is NULL), then out = hidden / sqrt(mean(hidden^2) + eps) * weight, row by row.
 * hidden, delta, out: [rows][width] of dtype, contiguous, aligned to 16 bytes, width a multiple of 8. The kernel ahead
 * on the stream must not be what writes the weight.
 */
typedef struct neo_cuda_norm {
    size_t size;
    void *hidden;
    const void *delta;
    const void *weight; /* [width] */
    void *out;          /* may not overlap hidden */
    int32_t rows;
    int32_t width; /* up to 16384 (FP32) or 32768 */
    int32_t dtype;
    float eps;
} neo_cuda_norm;

neo_cuda_status neo_cuda_add_rms_norm(const neo_cuda_norm *args, void *stream);

/*
 * The scale that a norm gives a row, for a product that was taken of the row as it was: with the norm's weight multiplied
 * into the columns of W, norm(hidden) W^T = scale * (hidden W^T), scale = 1 / sqrt(mean(hidden^2) + eps). Who reads the
 * product next multiplies by it, and no kernel for the norm stands between two products.
 */
typedef struct neo_cuda_scale {
    const void *hidden; /* NULL: 1; [rows][width], contiguous, aligned to 16 bytes */
    int32_t width;      /* a multiple of 8 */
    float eps;
} neo_cuda_scale;

/*
 * out[r][i] = silu(s gate_up[r][i]) * s gate_up[r][width + i], s the row's scale; rows contiguous, aligned to 16 bytes,
 * width a multiple of 8.
 */
typedef struct neo_cuda_silu {
    size_t size;
    const void *gate_up; /* [rows][2 * width] */
    void *out;           /* [rows][width] */
    int32_t rows;
    int32_t width;
    int32_t dtype;
    neo_cuda_scale scale;
} neo_cuda_silu;

neo_cuda_status neo_cuda_silu_mul(const neo_cuda_silu *args, void *stream);

/*
 * Of every row's position, in fp32 and rounded once: cos[row][d] = scale * cos(position * frequencies[d]), sin likewise.
 * Frequencies negated in the first half of head_dim give neo_cuda_qkv's signs.
 */
typedef struct neo_cuda_angles {
    size_t size;
    const int32_t *positions;  /* [rows] */
    const float *frequencies;  /* [head_dim] */
    void *cos, *sin;           /* [rows][head_dim] of dtype, contiguous */
    int32_t rows;
    int32_t head_dim; /* even, up to 256 */
    int32_t dtype;
    float scale;
} neo_cuda_angles;

neo_cuda_status neo_cuda_rope_angles(const neo_cuda_angles *args, void *stream);

/*
 * What becomes of a row of the fused projection [q heads | k heads | v heads]: it is scaled, bias is added, each q and k
 * head is normalised (RMS, times its weight), q and k are rotated:
 *     x[d] = x[d] * cos[row][d] + x[(d + head_dim / 2) % head_dim] * sin[row][d]
 * (sin negated in its first half). All in fp32, rounded once. q goes to q_out, k and v to k_out and v_out (where they
 * are not NULL), and rows whose slot is not negative are appended to the cache as token positions[row] of that slot.
 * q_out, k_out, v_out may be the very elements they come from, or elsewhere.
 */
typedef struct neo_cuda_qkv {
    size_t size;
    const neo_cuda_cache *cache; /* also gives kv_heads, head_dim and the type of all that follows */
    const void *qkv;             /* [rows][(q_heads + 2 * kv_heads) * head_dim] */
    int64_t qkv_stride;          /* elements */
    const void *bias;            /* NULL or [(q_heads + 2 * kv_heads) * head_dim] */
    const void *q_norm, *k_norm; /* both NULL or both [head_dim] */
    const void *cos, *sin;       /* [rows][head_dim] */
    void *q_out;                 /* [rows][q_heads][head_dim], rows apart by q_stride */
    void *k_out, *v_out;         /* NULL or [rows][kv_heads][head_dim], rows apart by kv_stride */
    int64_t q_stride, kv_stride; /* elements */
    const int32_t *block_tables; /* NULL: nothing is appended */
    int64_t table_stride;
    const int32_t *slots;     /* [rows]; negative: not appended */
    const int32_t *positions; /* [rows] */
    int32_t rows;
    int32_t q_heads;
    float eps; /* of the norms */
    /* Not 0: tables, slots, positions, cos, sin were there before the kernel ahead on the stream began. */
    int32_t early;
    neo_cuda_scale scale; /* of each row, before all else */
} neo_cuda_qkv;

neo_cuda_status neo_cuda_qkv_rope_append(const neo_cuda_qkv *args, void *stream);

/* ---- matrix products ---- */

/*
 * out = x weight^T (+ bias) (+ out), x [rows][in], weight [out][in], out [rows][out], all FP16 or all BF16, sums in fp32: a
 * kernel of cuBLASLt's, but one that was timed here. Its own choice goes by rules, which leave bandwidth unused where
 * there are few rows. cuBLASLt is not linked: it is the one that the process has loaded, or found by its name. Where
 * there is none, functions that need it return NEO_CUDA_UNSUPPORTED.
 *
 * A plan belongs to a size. Creating one asks cuBLASLt for kernels; neo_cuda_linear_tune times them (this one waits
 * for the device, and allocates: a stream, events, graphs); neo_cuda_linear launches the one that was fastest, or
 * before that cuBLASLt's first. A kernel's result does not change from call to call; another kernel's may differ by
 * rounding. One thread at a time may use a plan.
 */
typedef struct neo_cuda_linear_plan neo_cuda_linear_plan;

typedef struct neo_cuda_linear_shape {
    size_t size;
    const neo_cuda_linear_plan *like; /* NULL, or the plan of another number of rows, whose kernel this one takes over;
                                         NEO_CUDA_UNSUPPORTED where that one does not fit */
    int64_t x_stride, weight_stride, out_stride; /* elements between rows, multiples of 8 */
    size_t workspace_bytes;                      /* that a kernel may need */
    int32_t rows;
    int32_t in;  /* a multiple of 8 */
    int32_t out; /* a multiple of 8 */
    int32_t dtype;
    int32_t bias;   /* whether one is added */
    int32_t add;    /* whether the product is added to what is in out, in fp32 and rounded once */
    int32_t search; /* 0: what cuBLASLt proposes; 1: also split along `in`; 2: also other tiles and stages (seconds) */
} neo_cuda_linear_shape;

neo_cuda_status neo_cuda_linear_create(const neo_cuda_linear_shape *shape, neo_cuda_linear_plan **plan);
void neo_cuda_linear_destroy(neo_cuda_linear_plan *plan); /* NULL: nothing */

/* The weights take turns: they should be more than the device's L2 holds, as the layers of a model are. */
typedef struct neo_cuda_linear_trial {
    size_t size;
    neo_cuda_linear_plan *plan;
    const void *x;
    const void *const *weights; /* host memory: addresses on the device, aligned to 16 bytes */
    const void *bias;           /* NULL unless the plan has one */
    void *out;
    void *workspace; /* the plan's workspace_bytes, aligned to 256 */
    int32_t weight_count;
    int32_t launches; /* in a row, for one measurement; 1 to 256 */
} neo_cuda_linear_trial;

/* No other work should be on the device; x, weights and bias must be there. */
neo_cuda_status neo_cuda_linear_tune(const neo_cuda_linear_trial *trial);

/* What a plan has chosen; cuBLASLt's numbers for it. */
typedef struct neo_cuda_linear_choice {
    size_t size;
    size_t workspace_bytes;
    int32_t candidates; /* that were timed, or could be */
    int32_t chosen;     /* 0: cuBLASLt's first */
    int32_t algorithm, tile, stages, splits, cluster;
    float us;       /* of one launch, between others; 0: not tuned */
    float first_us; /* of cuBLASLt's first */
} neo_cuda_linear_choice;

neo_cuda_status neo_cuda_linear_describe(const neo_cuda_linear_plan *plan, neo_cuda_linear_choice *choice);

/* Pointers are aligned to 16 bytes, the workspace to 256; it serves one call at a time. */
typedef struct neo_cuda_linear_args {
    size_t size;
    neo_cuda_linear_plan *plan;
    const void *x;
    const void *weight;
    const void *bias; /* NULL unless the plan has one */
    void *out;        /* may not overlap the others; read, too, where the plan adds */
    void *workspace;
    size_t workspace_bytes; /* as many as the plan's */
} neo_cuda_linear_args;

neo_cuda_status neo_cuda_linear(const neo_cuda_linear_args *args, void *stream);

/* ---- gathering rows ---- */

/* The first `count` tokens of block `index` of row `slot` of a table become rows from `row` on. */
typedef struct neo_cuda_gather_entry {
    int32_t slot;
    int32_t index;
    int32_t row;
    int32_t count; /* 1 to block_size */
} neo_cuda_gather_entry;

/* K and V of tokens in the cache as rows, k and v: [rows][kv_heads][head_dim] of the cache's type, contiguous. */
typedef struct neo_cuda_gather_args {
    size_t size;
    const neo_cuda_cache *cache;
    const int32_t *block_tables; /* [slots][table_stride], of one layer */
    int64_t table_stride;        /* entries */
    const neo_cuda_gather_entry *entries; /* [count] on the device */
    void *k;
    void *v;
    int32_t count;
} neo_cuda_gather_args;

neo_cuda_status neo_cuda_gather(const neo_cuda_gather_args *args, void *stream);

/* ---- copying blocks ---- */

/*
 * Block dst_blocks[i] of one memory becomes block src_blocks[i] of another, for i < count. Either memory may be pinned;
 * a block is block_bytes long, block b lies at b * block_bytes. No block may be written twice, nor be both read and
 * written.
 */
typedef struct neo_cuda_copy {
    size_t size;
    const void *src; /* aligned to 16 bytes */
    void *dst;
    int64_t block_bytes;       /* a multiple of 16 */
    const int32_t *src_blocks; /* [count], device or pinned (neo_cuda_copy_blocks), any host memory (..._runs) */
    const int32_t *dst_blocks;
    const int32_t *count_at; /* NULL, or where the kernel reads how many pairs there are, `count` at most */
    int32_t count;
    int32_t ctas; /* thread blocks that copy: how much of the device this takes; 0: 16 */
} neo_cuda_copy;

/* One kernel; lists and *count_at are read when it runs. */
neo_cuda_status neo_cuda_copy_blocks(const neo_cuda_copy *args, void *stream);
/* The copy engines: a copy for each run of neighbours, all in one call where the driver has one; lists are read now, and
 * count_at must be NULL. Multiprocessors are left alone. Alone of all functions it cannot be captured. */
neo_cuda_status neo_cuda_copy_runs(const neo_cuda_copy *args, void *stream);

/* ---- hand-over ---- */

/*
 * A channel hands rows to the host and takes rows back, once per layer, with no call of the runtime between. Its
 * memory is the caller's, zeroed once:
 *   - `state`: 16 bytes of device memory;
 *   - `request`, `answer`, `error`: one pinned uint32 each, in cache lines of their own (128 bytes apart).
 *
 * neo_cuda_post_rows writes its rows to pinned memory and then sets *request to the next number of the device's own
 * count: 1 for the first post of the channel, one more for each. A graph may hold posts and be replayed: the count
 * goes on. The host waits for *request to reach the number, computes, writes the answer's rows, and sets *answer to
 * that number with a releasing store (neo_cpu_handover does all of it for a whole step). neo_cuda_await_rows waits
 * until *answer has reached the last number posted, then copies the rows to device memory. Numbers wrap around.
 * Post and await of a channel alternate on one stream (or are ordered by events).
 *
 * If the answer does not come within timeout_us, *error becomes the number waited for, output rows are left as they
 * are, and from then on every post and await of the channel does nothing (so a graph ends soon): the host finds
 * *error nonzero after the step and gives the step up. Zero the memory again to reopen the channel.
 */
typedef struct neo_cuda_channel {
    size_t size;
    uint32_t *state;
    uint32_t *request, *answer, *error; /* pinned, device addresses */
} neo_cuda_channel;

/* Row i becomes [q row | k row | v row] at packed + i * packed_stride bytes. Sizes are bytes, multiples of 16. */
typedef struct neo_cuda_post {
    size_t size;
    const neo_cuda_channel *channel;
    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride; /* bytes between rows */
    void *packed;                         /* pinned */
    int64_t packed_stride;                /* bytes, at least q_bytes + 2 * kv_bytes */
    const int32_t *rows_at;               /* NULL, or where the kernel reads how many rows there are, `rows` at most */
    int32_t rows;
    int32_t q_bytes; /* of a row */
    int32_t kv_bytes;
    int32_t ctas; /* 0: by size, 1 to 16 */
} neo_cuda_post;

neo_cuda_status neo_cuda_post_rows(const neo_cuda_post *args, void *stream);

typedef struct neo_cuda_await {
    size_t size;
    const neo_cuda_channel *channel;
    const void *packed;    /* pinned */
    int64_t packed_stride; /* bytes between rows */
    void *out;
    int64_t out_stride;     /* bytes between rows */
    const int32_t *rows_at; /* as above */
    int32_t rows;
    int32_t row_bytes; /* a multiple of 16 */
    int32_t ctas;      /* 0: by size, 1 to 16 */
    int64_t timeout_us;
} neo_cuda_await;

neo_cuda_status neo_cuda_await_rows(const neo_cuda_await *args, void *stream);

/*
 * Relayed decodes go a layer further each time the device passes there: rows leave a layer behind its rotary embedding
 * and are taken up by the next step at the same place. For each of `rows` rows, in the channel of the layer:
 *   - row of `hidden` and row of `kept` change places;
 *   - cos and sin become next_cos and next_sin (angle_bytes 0: they stay), for the rotary embedding of the layer behind;
 *   - once *answer has reached the last number posted, `came` (pinned) is copied to `out`;
 *   - then [q row | k row | v row] to `packed` (pinned), and *request is set to the next number.
 * So an answer is waited for before the post, not behind it, and answers what the step before has posted; the first
 * time there is nothing to wait for. Sizes are bytes, multiples of 16. A late answer: as above, kept rows are lost.
 */
typedef struct neo_cuda_relay {
    size_t size;
    const neo_cuda_channel *channel;
    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride; /* bytes between rows */
    void *packed;                         /* pinned */
    int64_t packed_stride;
    const void *came; /* pinned, rows of q_bytes */
    int64_t came_stride;
    void *out;
    int64_t out_stride;
    void *hidden, *kept;
    int64_t hidden_stride, kept_stride;
    void *cos, *sin;
    int64_t angle_stride;
    const void *next_cos, *next_sin;
    int64_t next_stride;
    int64_t timeout_us;
    int32_t rows;
    int32_t q_bytes; /* of a row */
    int32_t kv_bytes;
    int32_t hidden_bytes;
    int32_t angle_bytes;
    int32_t ctas; /* 0: by size, 1 to 16 */
} neo_cuda_relay;

neo_cuda_status neo_cuda_relay_rows(const neo_cuda_relay *args, void *stream);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
