/* What the C++ side hands to the ISPC side. Included by both; only types that mean the same in C and ISPC. */
#ifndef NEO_CPU_PIECE_H
#define NEO_CPU_PIECE_H

#ifdef ISPC
#define NEO_UNIFORM uniform
#define NEO_INT64 int64
#define NEO_INT32 int32
#else
#include <cstdint>
#define NEO_UNIFORM
#define NEO_INT64 int64_t
#define NEO_INT32 int32_t
#endif

/* A run of tokens of one sequence, for a range of its KV heads. */
struct NeoPiece {
    const void *NEO_UNIFORM k;           /* first KV head of the range, block 0 */
    const void *NEO_UNIFORM v;
    const NEO_INT32 *NEO_UNIFORM blocks; /* the piece's blocks, in order */
    const float *NEO_UNIFORM q;          /* [kv_heads * group][head_dim], times scale * log2(e) */
    float *NEO_UNIFORM sum_v;            /* out [kv_heads * group][head_dim]: sum of weight * V */
    float *NEO_UNIFORM reference;        /* out [kv_heads * group]: weights are 2^(score - reference) */
    float *NEO_UNIFORM sum_w;            /* out [kv_heads * group]: sum of weights */
    float *NEO_UNIFORM scratch;          /* 4 * NEO_MAX_SEGMENT floats */
    NEO_INT64 block_stride;              /* elements */
    NEO_INT64 head_stride;               /* elements */
    NEO_INT32 tokens;                    /* > 0 */
    NEO_INT32 segment;                   /* tokens per segment: a multiple of block_size, <= NEO_MAX_SEGMENT */
    NEO_INT32 block_size;                /* 8, 16 or 32 */
    NEO_INT32 head_dim;                  /* a multiple of 16 */
    NEO_INT32 kv_heads;
    NEO_INT32 group;                     /* query heads per KV head */
    NEO_INT32 whole;                     /* ask for all of K and V ahead, into both levels of cache, not only for starts */
};

#define NEO_MAX_SEGMENT 128

#endif
