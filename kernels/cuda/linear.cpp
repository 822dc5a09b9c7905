// Matrix products by kernels of cuBLASLt's that were timed.

#include "linear.h"

#include <cstring>
#include <memory>
#include <new>

#include "check.h"

namespace {

using namespace neo;

constexpr int ASKED = 64;         // kernels to propose
constexpr uint32_t ALIGNMENT = 16; // bytes, that every pointer has
constexpr int MOST_LAUNCHES = 256;

neo_cuda_status check_stride(const char *name, int64_t stride, int32_t least) noexcept {
    NEO_NEED(stride >= least && stride % 8 == 0, "%s is %lld, must be a multiple of 8, at least %d", name,
             static_cast<long long>(stride), least);
    return NEO_CUDA_OK;
}

neo_cuda_status check(const neo_cuda_linear_shape *shape) noexcept {
    NEO_NEED_SIZE(shape, "shape");
    NEO_NEED(shape->dtype == NEO_CUDA_FP16 || shape->dtype == NEO_CUDA_BF16, "dtype is %d, must be 1 (fp16) or 2 (bf16)",
             shape->dtype);
    NEO_NEED(shape->rows > 0, "rows is %d, must be positive", shape->rows);
    NEO_NEED(shape->in > 0 && shape->in % 8 == 0, "in is %d, must be a positive multiple of 8", shape->in);
    NEO_NEED(shape->out > 0 && shape->out % 8 == 0, "out is %d, must be a positive multiple of 8", shape->out);
    NEO_NEED(shape->search >= 0 && shape->search <= 2, "search is %d, must be 0, 1 or 2", shape->search);
    NEO_TRY(check_stride("x_stride", shape->x_stride, shape->in));
    NEO_TRY(check_stride("weight_stride", shape->weight_stride, shape->in));
    NEO_TRY(check_stride("out_stride", shape->out_stride, shape->out));
    if (const neo_cuda_linear_plan *like = shape->like) {
        const neo_cuda_linear_shape &other = like->shape;
        NEO_NEED(other.in == shape->in && other.out == shape->out && other.dtype == shape->dtype &&
                     (other.bias != 0) == (shape->bias != 0) && (other.add != 0) == (shape->add != 0),
                 "like: its plan is of %d x %d, this one of %d x %d, or types, bias or add differ", other.out, other.in,
                 shape->out, shape->in);
    }
    return NEO_CUDA_OK;
}

neo_cuda_status check(const neo_cuda_linear_plan *plan, const void *x, const void *bias, const void *out,
                      const void *workspace, size_t bytes) noexcept {
    NEO_NEED(plan != nullptr, "plan must not be NULL");
    NEO_NEED(x != nullptr && out != nullptr, "x and out must not be NULL");
    NEO_NEED((bias != nullptr) == (plan->shape.bias != 0), "bias must be %s, as the plan says",
             plan->shape.bias != 0 ? "given" : "NULL");
    NEO_NEED(bytes >= plan->shape.workspace_bytes, "workspace_bytes is %zu, the plan's is %zu", bytes,
             plan->shape.workspace_bytes);
    NEO_NEED(workspace != nullptr || plan->shape.workspace_bytes == 0, "workspace must not be NULL");
    NEO_NEED(aligned(x, ALIGNMENT) && aligned(bias, ALIGNMENT) && aligned(out, ALIGNMENT),
             "x, bias and out must be aligned to %u bytes", ALIGNMENT);
    NEO_NEED(aligned(workspace, 256), "workspace must be aligned to 256 bytes");
    return NEO_CUDA_OK;
}

// Descriptors of the operation and its matrices.
neo_cuda_status describe(neo_cuda_linear_plan &plan) noexcept {
    const neo_cuda_linear_shape &shape = plan.shape;
    const lt::Library &library = *plan.library;
    const int type = shape.dtype == NEO_CUDA_FP16 ? lt::FP16 : lt::BF16;
    NEO_TRY(lt::status_of(library.operation_create(&plan.operation, lt::COMPUTE_FP32, lt::FP32), "describing a product"));
    int status = library.operation_set(plan.operation, lt::TRANSPOSE_A, &lt::TRANSPOSED, sizeof lt::TRANSPOSED);
    if (status == 0 && shape.bias != 0)
        status = library.operation_set(plan.operation, lt::EPILOGUE, &lt::EPILOGUE_BIAS, sizeof lt::EPILOGUE_BIAS);
    NEO_TRY(lt::status_of(status, "describing a product"));
    NEO_TRY(lt::status_of(library.layout_create(&plan.weight, type, shape.in, shape.out, shape.weight_stride),
                          "describing weights"));
    NEO_TRY(lt::status_of(library.layout_create(&plan.x, type, shape.in, shape.rows, shape.x_stride), "describing x"));
    return lt::status_of(library.layout_create(&plan.out, type, shape.out, shape.rows, shape.out_stride),
                         "describing out");
}

// What cuBLASLt proposes within so much workspace.
neo_cuda_status propose(neo_cuda_linear_plan &plan, size_t workspace) {
    const lt::Library &library = *plan.library;
    lt::Preference preference = nullptr;
    NEO_TRY(lt::status_of(library.preference_create(&preference), "asking for kernels"));
    const uint64_t most = workspace;
    int status = library.preference_set(preference, lt::MOST_WORKSPACE, &most, sizeof most);
    if (status == 0)
        status = library.preference_set(preference, lt::REDUCTIONS, &lt::REDUCE_FP32, sizeof lt::REDUCE_FP32);
    for (const int which : {lt::ALIGNMENT_A, lt::ALIGNMENT_B, lt::ALIGNMENT_C, lt::ALIGNMENT_D})
        if (status == 0)
            status = library.preference_set(preference, which, &ALIGNMENT, sizeof ALIGNMENT);
    lt::Found found[ASKED];
    int count = 0;
    if (status == 0)
        status = library.heuristic(plan.handle, plan.operation, plan.weight, plan.x, plan.out, plan.out, preference,
                                   ASKED, found, &count);
    library.preference_destroy(preference);
    if (status != 0) // no kernel within these bounds, or an attribute it does not know
        count = 0;
    for (int i = 0; i < count; i++)
        if (found[i].status == 0)
            add(plan, found[i].algorithm);
    return NEO_CUDA_OK;
}

neo_cuda_status fill(neo_cuda_linear_plan &plan) {
    NEO_TRY(describe(plan));
    const neo_cuda_linear_plan *like = plan.shape.like;
    plan.shape.like = nullptr;
    if (like != nullptr) {
        if (!add(plan, like->candidates[like->chosen].algorithm))
            return fail(NEO_CUDA_UNSUPPORTED, "the kernel of %d rows does not do %d", like->shape.rows, plan.shape.rows);
        return NEO_CUDA_OK;
    }
    // Its own first is that of the most workspace; less brings others forth.
    for (const size_t workspace : {plan.shape.workspace_bytes, plan.shape.workspace_bytes / 8, size_t{0}})
        NEO_TRY(propose(plan, workspace));
    if (plan.candidates.empty())
        return fail(NEO_CUDA_UNSUPPORTED, "cuBLASLt has no kernel for %d x %d x %d", plan.shape.rows, plan.shape.out,
                    plan.shape.in);
    return NEO_CUDA_OK;
}

template <class T> int32_t number(const neo_cuda_linear_plan &plan, const lt::Algorithm &of, int attribute) noexcept {
    T value{};
    size_t written = 0;
    plan.library->choice_get(&of, attribute, &value, sizeof value, &written);
    return static_cast<int32_t>(value);
}

neo_cuda_status out_of_memory() noexcept { return fail(NEO_CUDA_DEVICE, "no memory for a plan"); }

} // namespace

neo_cuda_linear_plan::~neo_cuda_linear_plan() {
    for (const neo::lt::Layout layout : {weight, x, out})
        if (layout != nullptr)
            library->layout_destroy(layout);
    if (operation != nullptr)
        library->operation_destroy(operation);
}

bool neo::add(neo_cuda_linear_plan &plan, const lt::Algorithm &algorithm) {
    for (const Candidate &known : plan.candidates)
        if (std::memcmp(&known.algorithm, &algorithm, sizeof algorithm) == 0)
            return false;
    lt::Found found{};
    const int status = plan.library->check(plan.handle, plan.operation, plan.weight, plan.x, plan.out, plan.out,
                                           &algorithm, &found);
    if (status != 0 || found.status != 0 || found.workspace > plan.shape.workspace_bytes)
        return false;
    plan.candidates.push_back(Candidate{algorithm, found.workspace, 0.f});
    return true;
}

int neo::launch(neo_cuda_linear_plan &plan, const Candidate &candidate, const Product &product,
                cudaStream_t stream) noexcept {
    constexpr float one = 1.f;
    const float before = plan.shape.add != 0 ? 1.f : 0.f;
    const lt::Library &library = *plan.library;
    if (plan.shape.bias != 0)
        if (const int status =
                library.operation_set(plan.operation, lt::BIAS_POINTER, &product.bias, sizeof product.bias))
            return status;
    return library.matmul(plan.handle, plan.operation, &one, product.weight, plan.weight, product.x, plan.x, &before,
                          product.out, plan.out, product.out, plan.out, &candidate.algorithm, product.workspace,
                          candidate.workspace, stream);
}

extern "C" neo_cuda_status neo_cuda_linear_create(const neo_cuda_linear_shape *shape, neo_cuda_linear_plan **plan) {
    clear_error();
    NEO_NEED(plan != nullptr, "plan must not be NULL");
    *plan = nullptr;
    NEO_TRY(check(shape));
    try {
        auto made = std::make_unique<neo_cuda_linear_plan>();
        made->shape = *shape;
        NEO_TRY(lt::open(made->library, made->handle));
        NEO_TRY(fill(*made));
        *plan = made.release();
    } catch (const std::bad_alloc &) {
        return out_of_memory();
    }
    return NEO_CUDA_OK;
}

extern "C" void neo_cuda_linear_destroy(neo_cuda_linear_plan *plan) { delete plan; }

extern "C" neo_cuda_status neo_cuda_linear_tune(const neo_cuda_linear_trial *trial) {
    clear_error();
    NEO_NEED_SIZE(trial, "trial");
    NEO_NEED(trial->plan != nullptr, "plan must not be NULL");
    NEO_TRY(check(trial->plan, trial->x, trial->bias, trial->out, trial->workspace, trial->plan->shape.workspace_bytes));
    NEO_NEED(trial->weights != nullptr && trial->weight_count > 0, "weights must be there, weight_count is %d",
             trial->weight_count);
    for (int32_t i = 0; i < trial->weight_count; i++)
        NEO_NEED(trial->weights[i] != nullptr && aligned(trial->weights[i], ALIGNMENT),
                 "weights[%d] must not be NULL and be aligned to %u bytes", i, ALIGNMENT);
    NEO_NEED(trial->launches > 0 && trial->launches <= MOST_LAUNCHES, "launches is %d, must be 1 to %d", trial->launches,
             MOST_LAUNCHES);
    try {
        return tune(*trial);
    } catch (const std::bad_alloc &) {
        return out_of_memory();
    }
}

extern "C" neo_cuda_status neo_cuda_linear_describe(const neo_cuda_linear_plan *plan, neo_cuda_linear_choice *choice) {
    clear_error();
    NEO_NEED(plan != nullptr, "plan must not be NULL");
    NEO_NEED_SIZE(choice, "choice");
    const Candidate &chosen = plan->candidates[plan->chosen];
    choice->workspace_bytes = chosen.workspace;
    choice->candidates = static_cast<int32_t>(plan->candidates.size());
    choice->chosen = plan->chosen;
    choice->algorithm = number<int32_t>(*plan, chosen.algorithm, lt::ID);
    choice->tile = number<uint32_t>(*plan, chosen.algorithm, lt::TILE);
    choice->stages = number<uint32_t>(*plan, chosen.algorithm, lt::STAGE);
    choice->splits = number<int32_t>(*plan, chosen.algorithm, lt::SPLITS);
    choice->cluster = number<uint16_t>(*plan, chosen.algorithm, lt::CLUSTER);
    choice->us = chosen.us;
    choice->first_us = plan->candidates.front().us;
    return NEO_CUDA_OK;
}

extern "C" neo_cuda_status neo_cuda_linear(const neo_cuda_linear_args *args, void *stream) {
    clear_error();
    NEO_NEED_SIZE(args, "args");
    NEO_TRY(check(args->plan, args->x, args->bias, args->out, args->workspace, args->workspace_bytes));
    NEO_NEED(args->weight != nullptr && aligned(args->weight, ALIGNMENT),
             "weight must not be NULL and be aligned to %u bytes", ALIGNMENT);
    neo_cuda_linear_plan &plan = *args->plan;
    const Product product{args->x, args->weight, args->bias, args->out, args->workspace};
    return lt::status_of(launch(plan, plan.candidates[plan.chosen], product, static_cast<cudaStream_t>(stream)),
                         "matrix product");
}
