// Times candidates as they will run: in a graph, one product behind the other, each with another layer's weights.

#include <algorithm>
#include <limits>

#include "linear.h"

namespace {

using namespace neo;

constexpr float NEVER = std::numeric_limits<float>::infinity();
constexpr int GLANCES = 3;        // measurements of every candidate
constexpr int LOOKS = 7;          // of those that are then near the best
constexpr float NEAR = 1.08f;     // times the best
constexpr size_t MOST_NEAR = 6;
constexpr float GAIN = 0.99f;     // of its time: what makes another worth taking over cuBLASLt's first
constexpr size_t BASES = 3;       // that are varied
constexpr int WARM_MS = 5;        // of work ahead of the first measurement, for the clocks
constexpr size_t MOST_TIMED = 600;

// A stream and two events.
class Bench {
  public:
    explicit Bench(const neo_cuda_linear_trial &trial) : trial(trial) {}
    Bench(const Bench &) = delete;
    Bench &operator=(const Bench &) = delete;
    ~Bench() {
        if (end != nullptr)
            cudaEventDestroy(end);
        if (begin != nullptr)
            cudaEventDestroy(begin);
        if (stream != nullptr)
            cudaStreamDestroy(stream);
    }

    neo_cuda_status open() noexcept {
        NEO_TRY(from_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream"));
        NEO_TRY(from_cuda(cudaEventCreate(&begin), "making an event"));
        return from_cuda(cudaEventCreate(&end), "making an event");
    }

    // Microseconds of one launch, the least of several measurements; NEVER where the kernel refuses. An error of the
    // device is an error of the call.
    neo_cuda_status time(const Candidate &candidate, int measurements, float &us) noexcept {
        us = NEVER;
        // Once outside of a graph: its code is loaded now.
        if (run(candidate, 0) != 0) {
            cudaGetLastError();
            return NEO_CUDA_OK;
        }
        NEO_TRY(from_cuda(cudaStreamSynchronize(stream), "timing matrix products"));
        cudaGraphExec_t graph = nullptr;
        NEO_TRY(capture(candidate, graph));
        if (graph == nullptr)
            return NEO_CUDA_OK;
        const neo_cuda_status status = replay(graph, measurements, us);
        cudaGraphExecDestroy(graph);
        return status;
    }

  private:
    int run(const Candidate &candidate, int turn) noexcept {
        const void *weight = trial.weights[turn % trial.weight_count];
        return launch(*trial.plan, candidate, Product{trial.x, weight, trial.bias, trial.out, trial.workspace}, stream);
    }

    // NULL where the kernel cannot be captured.
    neo_cuda_status capture(const Candidate &candidate, cudaGraphExec_t &found) noexcept {
        NEO_TRY(from_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing"));
        int refused = 0;
        for (int32_t i = 0; i < trial.launches && refused == 0; i++)
            refused = run(candidate, i);
        cudaGraph_t graph = nullptr;
        const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
        if (refused == 0 && ended == cudaSuccess && cudaGraphInstantiate(&found, graph, 0) != cudaSuccess)
            found = nullptr;
        if (graph != nullptr)
            cudaGraphDestroy(graph);
        cudaGetLastError();
        return NEO_CUDA_OK;
    }

    neo_cuda_status replay(cudaGraphExec_t graph, int measurements, float &us) noexcept {
        float spent = 0.f;
        // The first is not counted; at the very start, more are not.
        for (int i = 0; i <= measurements;) {
            float ms = 0.f;
            cudaError_t error = cudaEventRecord(begin, stream);
            error = error == cudaSuccess ? cudaGraphLaunch(graph, stream) : error;
            error = error == cudaSuccess ? cudaEventRecord(end, stream) : error;
            error = error == cudaSuccess ? cudaEventSynchronize(end) : error;
            error = error == cudaSuccess ? cudaEventElapsedTime(&ms, begin, end) : error;
            NEO_TRY(from_cuda(error, "timing matrix products"));
            spent += ms;
            warm = warm || spent > WARM_MS;
            if (warm && i++ > 0)
                us = std::min(us, ms * 1000.f / static_cast<float>(trial.launches));
        }
        return NEO_CUDA_OK;
    }

    const neo_cuda_linear_trial &trial;
    cudaStream_t stream = nullptr;
    cudaEvent_t begin = nullptr, end = nullptr;
    bool warm = false;
};

// Of the timed candidates, the fastest so many within `near` of the best.
std::vector<size_t> fastest(const neo_cuda_linear_plan &plan, size_t most, float near) {
    std::vector<size_t> order(plan.candidates.size());
    for (size_t i = 0; i < order.size(); i++)
        order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return plan.candidates[a].us < plan.candidates[b].us; });
    const float limit = plan.candidates[order.front()].us * near;
    while (order.size() > most || plan.candidates[order.back()].us > limit)
        order.pop_back();
    return order;
}

// ---- neighbours of an algorithm ----

using Values = std::vector<uint32_t>;

Values capable(const neo_cuda_linear_plan &plan, const lt::Algorithm &algorithm, lt::Capability which) {
    size_t bytes = 0;
    if (plan.library->capability(&algorithm, which, nullptr, 0, &bytes) != 0 || bytes == 0)
        return {};
    Values found(bytes / sizeof(uint32_t));
    if (plan.library->capability(&algorithm, which, found.data(), bytes, &bytes) != 0)
        return {};
    return found;
}

uint32_t number_of(const neo_cuda_linear_plan &plan, const lt::Algorithm &algorithm, lt::Capability which) noexcept {
    uint32_t value = 0;
    size_t written = 0;
    return plan.library->capability(&algorithm, which, &value, sizeof value, &written) == 0 ? value : 0;
}

template <class T>
void try_value(neo_cuda_linear_plan &plan, lt::Algorithm algorithm, lt::Choice which, uint32_t value) {
    const T as = static_cast<T>(value);
    if (plan.library->choice_set(&algorithm, which, &as, sizeof as) == 0)
        add(plan, algorithm);
}

void try_splits(neo_cuda_linear_plan &plan, lt::Algorithm algorithm, uint32_t splits) {
    const int32_t count = static_cast<int32_t>(splits);
    const uint32_t reduction = splits > 1 ? lt::REDUCE_FP32 : 0;
    if (plan.library->choice_set(&algorithm, lt::SPLITS, &count, sizeof count) == 0 &&
        plan.library->choice_set(&algorithm, lt::REDUCTION, &reduction, sizeof reduction) == 0)
        add(plan, algorithm);
}

// One thing changed at a time; a tile, which bounds its stages, with any of them.
void vary(neo_cuda_linear_plan &plan, const lt::Algorithm base) {
    if (number_of(plan, base, lt::CAN_SPLIT) != 0)
        for (const uint32_t splits : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16})
            try_splits(plan, base, splits);
    if (plan.shape.search < 2)
        return;
    const Values stages = capable(plan, base, lt::STAGES);
    for (const uint32_t stage : stages)
        try_value<uint32_t>(plan, base, lt::STAGE, stage);
    for (const uint32_t tile : capable(plan, base, lt::TILES)) {
        lt::Algorithm other = base;
        if (plan.library->choice_set(&other, lt::TILE, &tile, sizeof tile) != 0)
            continue;
        add(plan, other);
        for (const uint32_t stage : stages)
            try_value<uint32_t>(plan, other, lt::STAGE, stage);
    }
    for (uint32_t cluster = 2; cluster <= 51; cluster++)
        try_value<uint16_t>(plan, base, lt::CLUSTER, cluster);
    for (const uint32_t swizzle : {0, 1})
        try_value<uint32_t>(plan, base, lt::SWIZZLE, swizzle);
    for (uint32_t custom = 0; custom <= std::min(number_of(plan, base, lt::MOST_CUSTOM), 32u); custom++)
        try_value<uint32_t>(plan, base, lt::CUSTOM, custom);
}

// Times what has not been timed.
neo_cuda_status glance(neo_cuda_linear_plan &plan, Bench &bench) {
    if (plan.candidates.size() > MOST_TIMED)
        plan.candidates.resize(MOST_TIMED);
    for (Candidate &candidate : plan.candidates)
        if (candidate.us == 0.f)
            NEO_TRY(bench.time(candidate, GLANCES, candidate.us));
    return NEO_CUDA_OK;
}

neo_cuda_status widen(neo_cuda_linear_plan &plan, Bench &bench) {
    for (int round = 0; round < plan.shape.search; round++) {
        for (const size_t base : fastest(plan, BASES, NEVER))
            vary(plan, plan.candidates[base].algorithm);
        NEO_TRY(glance(plan, bench));
    }
    return NEO_CUDA_OK;
}

} // namespace

neo_cuda_status neo::tune(const neo_cuda_linear_trial &trial) {
    neo_cuda_linear_plan &plan = *trial.plan;
    Bench bench(trial);
    NEO_TRY(bench.open());
    NEO_TRY(glance(plan, bench));
    NEO_TRY(widen(plan, bench));
    std::vector<size_t> near = fastest(plan, MOST_NEAR, NEAR);
    if (plan.candidates[near.front()].us == NEVER)
        return fail(NEO_CUDA_UNSUPPORTED, "none of cuBLASLt's %zu kernels runs", plan.candidates.size());
    if (std::find(near.begin(), near.end(), 0u) == near.end())
        near.push_back(0);
    size_t best = 0;
    for (const size_t i : near) {
        Candidate &candidate = plan.candidates[i];
        NEO_TRY(bench.time(candidate, LOOKS, candidate.us));
    }
    for (const size_t i : near)
        if (plan.candidates[i].us < plan.candidates[best].us)
            best = i;
    if (plan.candidates[best].us >= GAIN * plan.candidates.front().us)
        best = 0;
    plan.chosen = static_cast<int>(best);
    return NEO_CUDA_OK;
}
