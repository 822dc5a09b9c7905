// The part of cuBLASLt that linear.cpp calls, found at run time: neither its headers nor the library are needed to build
// or to load this one. Names and numbers are those of cublasLt.h, the same in its versions 12 and 13.
#pragma once

#include <cuda_runtime_api.h>

#include "error.h"

namespace neo::lt {

using Handle = struct Context *;
using Operation = struct OperationDescriptor *;
using Layout = struct LayoutDescriptor *;
using Preference = struct PreferenceDescriptor *;

// cublasLtMatmulAlgo_t
struct Algorithm {
    uint64_t data[8];
};

// cublasLtMatmulHeuristicResult_t
struct Found {
    Algorithm algorithm;
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Found) == 96, "the layout that cuBLASLt writes");

constexpr int FP32 = 0, FP16 = 2, BF16 = 14; // cudaDataType_t
constexpr int COMPUTE_FP32 = 68;             // CUBLAS_COMPUTE_32F
constexpr int32_t TRANSPOSED = 1;            // CUBLAS_OP_T
constexpr int32_t EPILOGUE_BIAS = 4;

enum OperationAttribute { TRANSPOSE_A = 3, EPILOGUE = 7, BIAS_POINTER = 8 };
enum PreferenceAttribute {
    MOST_WORKSPACE = 1,
    REDUCTIONS = 3,
    ALIGNMENT_A = 5,
    ALIGNMENT_B = 6,
    ALIGNMENT_C = 7,
    ALIGNMENT_D = 8
};
enum Capability { CAN_SPLIT = 0, TILES = 6, MOST_CUSTOM = 7, STAGES = 13 };
enum Choice { ID = 0, TILE = 1, SPLITS = 2, REDUCTION = 3, SWIZZLE = 4, CUSTOM = 5, STAGE = 6, CLUSTER = 8 };
// Partial sums of a split stay in fp32, in the workspace, and are added in a fixed order: the same bits every time.
constexpr uint32_t REDUCE_FP32 = 2;

struct Library {
    size_t (*version)();
    int (*create)(Handle *);
    int (*operation_create)(Operation *, int compute, int scale);
    int (*operation_destroy)(Operation);
    int (*operation_set)(Operation, int attribute, const void *, size_t);
    int (*layout_create)(Layout *, int type, uint64_t rows, uint64_t columns, int64_t stride);
    int (*layout_destroy)(Layout);
    int (*preference_create)(Preference *);
    int (*preference_destroy)(Preference);
    int (*preference_set)(Preference, int attribute, const void *, size_t);
    int (*heuristic)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference, int most, Found *, int *);
    int (*check)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, const Algorithm *, Found *);
    int (*capability)(const Algorithm *, int attribute, void *, size_t, size_t *written);
    int (*choice_get)(const Algorithm *, int attribute, void *, size_t, size_t *written);
    int (*choice_set)(Algorithm *, int attribute, const void *, size_t);
    int (*matmul)(Handle, Operation, const void *alpha, const void *a, Layout, const void *b, Layout, const void *beta,
                  const void *c, Layout, void *d, Layout, const Algorithm *, void *workspace, size_t, cudaStream_t);
};

// The library, once per process, and a handle of the current device; NEO_CUDA_UNSUPPORTED where there is none.
neo_cuda_status open(const Library *&library, Handle &handle) noexcept;
// Its status as ours, with what was being done.
neo_cuda_status status_of(int status, const char *doing) noexcept;

} // namespace neo::lt
