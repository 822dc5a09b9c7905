#include "handover.h"

#include <cstdio>
#include <memory>
#include <new>

#include "decode.h"
#include "error.h"
#include "thread.h"

namespace {

using neo::fail;

constexpr int32_t MAX_STAGES = 1 << 16;

neo_cpu_status check(const neo_cpu_handover &handover) noexcept {
    if (handover.size != sizeof(handover))
        return fail(NEO_CPU_BAD_ARGUMENT, "hand-over has size %zu, this library's %zu", handover.size, sizeof(handover));
    if (handover.n_stages < 0 || handover.n_stages > MAX_STAGES)
        return fail(NEO_CPU_BAD_ARGUMENT, "n_stages is %d, must be 0 to %d", handover.n_stages, MAX_STAGES);
    if (handover.layers < 0)
        return fail(NEO_CPU_BAD_ARGUMENT, "layers is %d, must not be negative", handover.layers);
    if (handover.n_stages > 0 && handover.stages == nullptr)
        return fail(NEO_CPU_BAD_ARGUMENT, "stages must not be NULL");
    for (int32_t s = 0; s < handover.n_stages; s++) {
        const neo_cpu_stage &stage = handover.stages[s];
        if (stage.size != sizeof(stage))
            return fail(NEO_CPU_BAD_ARGUMENT, "stage %d has size %zu, this library's %zu", s, stage.size, sizeof(stage));
        if (stage.append != nullptr && stage.append->size != sizeof(neo_cpu_append))
            return fail(NEO_CPU_BAD_ARGUMENT, "stage %d: append has size %zu, this library's %zu", s,
                        stage.append->size, sizeof(neo_cpu_append));
        if (stage.decode != nullptr && stage.decode->size != sizeof(neo_cpu_decode))
            return fail(NEO_CPU_BAD_ARGUMENT, "stage %d: decode has size %zu, this library's %zu", s,
                        stage.decode->size, sizeof(neo_cpu_decode));
        if (stage.layer_stride < 0)
            return fail(NEO_CPU_BAD_ARGUMENT, "stage %d: layer_stride is %lld, must not be negative", s,
                        static_cast<long long>(stage.layer_stride));
    }
    return NEO_CPU_OK;
}

// More partial results than that are not worth a barrier less: they should stay in the caches.
constexpr int64_t MOST_PARTIAL_BYTES = 8 << 20;

// A stage's arguments, which move on by a layer at a time.
struct Stage {
    neo_cpu_append append;
    neo_cpu_decode decode;
};

void set(volatile uint32_t *flag, uint32_t number) noexcept {
    if (flag != nullptr)
        __atomic_store_n(flag, number, __ATOMIC_RELEASE);
}

// Stages of a layer, some of which are served together.
class Layer {
  public:
    Layer(const neo_cpu_handover &handover, Stage *stages, int32_t layer, int64_t *times) noexcept
        : handover_(handover), stages_(stages), layer_(layer), times_(times) {}

    // Stage `first`, whose request is there, and those behind it that need not be waited for; returns how many.
    int32_t serve(int32_t first, neo_cpu_pool *pool, neo_cpu_status *status, int32_t *wrong) noexcept {
        first_ = first;
        began_ = neo::now_ns();
        neo::Part parts[neo::MAX_PARTS];
        int32_t count = 0;
        int64_t bytes = 0;
        while (first + count < handover_.n_stages && count < neo::MAX_PARTS && (count == 0 || asked(first + count))) {
            const neo_cpu_stage &given = handover_.stages[first + count];
            Stage &stage = stages_[first + count];
            bytes += given.decode == nullptr ? 0 : neo::partial_bytes(&stage.decode);
            if (count > 0 && bytes > MOST_PARTIAL_BYTES)
                break;
            parts[count++] = neo::Part{given.append == nullptr ? nullptr : &stage.append,
                                       given.decode == nullptr ? nullptr : &stage.decode};
        }
        *status = neo::attend_all(pool, parts, count, &Layer::done, this, wrong);
        *wrong += first;
        for (int32_t s = first; s < first + count; s++) {
            const int64_t stride = handover_.stages[s].layer_stride;
            if (handover_.stages[s].append != nullptr && stages_[s].append.block_tables != nullptr)
                stages_[s].append.block_tables += stride;
            if (handover_.stages[s].decode != nullptr && stages_[s].decode.block_tables != nullptr)
                stages_[s].decode.block_tables += stride;
        }
        return count;
    }

    uint32_t number(int32_t stage) const noexcept {
        return handover_.stages[stage].first + static_cast<uint32_t>(layer_);
    }

  private:
    bool asked(int32_t stage) const noexcept {
        const volatile uint32_t *request = handover_.stages[stage].request;
        return request == nullptr ||
               static_cast<int32_t>(__atomic_load_n(request, __ATOMIC_ACQUIRE) - number(stage)) >= 0;
    }

    static void done(void *context, int32_t part) noexcept {
        Layer &own = *static_cast<Layer *>(context);
        const int32_t stage = own.first_ + part;
        set(own.handover_.stages[stage].answer, own.number(stage));
        if (own.times_ != nullptr) {
            int64_t *time = own.times_ + 2 * (int64_t{own.layer_} * own.handover_.n_stages + stage);
            time[0] = own.began_;
            time[1] = own.began_ = neo::now_ns();
        }
    }

    const neo_cpu_handover &handover_;
    Stage *stages_;
    const int32_t layer_;
    int64_t *times_;
    int32_t first_ = 0;
    int64_t began_ = 0; // when what comes next was begun
};

} // namespace

neo_cpu_status neo::serve(const neo_cpu_handover &handover, neo_cpu_pool *pool, const Patience &patience) noexcept {
    if (const neo_cpu_status status = check(handover))
        return status;
    const std::unique_ptr<Stage[]> stages(new (std::nothrow) Stage[handover.n_stages]);
    if (stages == nullptr)
        return fail(NEO_CPU_NO_MEMORY, "no memory for %d stages", handover.n_stages);
    for (int32_t s = 0; s < handover.n_stages; s++) {
        if (handover.stages[s].append != nullptr)
            stages[s].append = *handover.stages[s].append;
        if (handover.stages[s].decode != nullptr)
            stages[s].decode = *handover.stages[s].decode;
    }
    for (int32_t l = 0; l < handover.layers; l++) {
        Layer layer(handover, stages.get(), l, handover.times);
        for (int32_t s = 0; s < handover.n_stages;) {
            int32_t wrong = s;
            neo_cpu_status status = NEO_CPU_OK;
            if (handover.stages[s].request != nullptr)
                status = await_number(handover.stages[s].request, layer.number(s), "the request", patience);
            if (status == NEO_CPU_OK)
                s += layer.serve(s, pool, &status, &wrong);
            if (status != NEO_CPU_OK) {
                char why[sizeof(neo_cpu_job::message)];
                std::snprintf(why, sizeof(why), "%s", neo_cpu_last_error());
                return fail(status, "layer %d, stage %d: %s", l, wrong, why);
            }
        }
    }
    return NEO_CPU_OK;
}

void neo::release(const neo_cpu_handover &handover) noexcept {
    if (check(handover) != NEO_CPU_OK || handover.layers == 0)
        return;
    for (int32_t s = 0; s < handover.n_stages; s++)
        set(handover.stages[s].answer, handover.stages[s].first + static_cast<uint32_t>(handover.layers) - 1);
}
