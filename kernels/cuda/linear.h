// Plans of matrix products: what linear.cpp makes and linear_tune.cpp looks for the best in.
#pragma once

#include <vector>

#include "cublaslt.h"

namespace neo {

struct Candidate {
    lt::Algorithm algorithm;
    size_t workspace;
    float us; // 0: not timed
};

} // namespace neo

// cuBLASLt's matrices are column-major: out^T [out][rows] = weight [out][in] x^T [in][rows]; its A is the weight, its B x.
struct neo_cuda_linear_plan {
    neo_cuda_linear_shape shape{};
    const neo::lt::Library *library = nullptr;
    neo::lt::Handle handle = nullptr;
    neo::lt::Operation operation = nullptr;
    neo::lt::Layout weight = nullptr, x = nullptr, out = nullptr;
    std::vector<neo::Candidate> candidates; // cuBLASLt's first is the first
    int chosen = 0;

    neo_cuda_linear_plan() = default;
    neo_cuda_linear_plan(const neo_cuda_linear_plan &) = delete;
    neo_cuda_linear_plan &operator=(const neo_cuda_linear_plan &) = delete;
    ~neo_cuda_linear_plan();
};

namespace neo {

// Pointers of one product.
struct Product {
    const void *x, *weight, *bias;
    void *out, *workspace;
};

// cuBLASLt's status. Where the plan adds, out is read as C and written as D, which cuBLASLt allows in place.
int launch(neo_cuda_linear_plan &plan, const Candidate &candidate, const Product &product, cudaStream_t stream) noexcept;
// Adds an algorithm unless it is there already, does not do or needs too much workspace; whether it was added.
bool add(neo_cuda_linear_plan &plan, const lt::Algorithm &algorithm);
// Times the candidates, and more of them as shape.search says; chooses. May throw std::bad_alloc.
neo_cuda_status tune(const neo_cuda_linear_trial &trial);

} // namespace neo
