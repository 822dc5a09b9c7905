#include "handover.h"

#include <cstdio>
#include <memory>
#include <new>

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

// A stage's arguments, which move on by a layer at a time.
struct Stage {
    neo_cpu_append append;
    neo_cpu_decode decode;
};

neo_cpu_status attend(const neo_cpu_stage &stage, Stage &layer, neo_cpu_pool *pool) noexcept {
    neo_cpu_status status = NEO_CPU_OK;
    if (stage.append != nullptr) {
        status = neo_cpu_append_kv(pool, &layer.append);
        if (layer.append.block_tables != nullptr)
            layer.append.block_tables += stage.layer_stride;
    }
    if (status == NEO_CPU_OK && stage.decode != nullptr) {
        status = neo_cpu_decode_attention(pool, &layer.decode);
        if (layer.decode.block_tables != nullptr)
            layer.decode.block_tables += stage.layer_stride;
    }
    return status;
}

void set(volatile uint32_t *flag, uint32_t number) noexcept {
    if (flag != nullptr)
        __atomic_store_n(flag, number, __ATOMIC_RELEASE);
}

} // namespace

neo_cpu_status neo::serve(const neo_cpu_handover &handover, neo_cpu_pool *pool, const Patience &patience) noexcept {
    if (const neo_cpu_status status = check(handover))
        return status;
    const std::unique_ptr<Stage[]> layers(new (std::nothrow) Stage[handover.n_stages]);
    if (layers == nullptr)
        return fail(NEO_CPU_NO_MEMORY, "no memory for %d stages", handover.n_stages);
    for (int32_t s = 0; s < handover.n_stages; s++) {
        if (handover.stages[s].append != nullptr)
            layers[s].append = *handover.stages[s].append;
        if (handover.stages[s].decode != nullptr)
            layers[s].decode = *handover.stages[s].decode;
    }
    int64_t *times = handover.times;
    for (int32_t l = 0; l < handover.layers; l++)
        for (int32_t s = 0; s < handover.n_stages; s++) {
            const neo_cpu_stage &stage = handover.stages[s];
            const uint32_t number = stage.first + static_cast<uint32_t>(l);
            neo_cpu_status status = NEO_CPU_OK;
            if (stage.request != nullptr)
                status = await_number(stage.request, number, "the request", patience);
            const int64_t began = times != nullptr ? now_ns() : 0;
            if (status == NEO_CPU_OK)
                status = attend(stage, layers[s], pool);
            if (status != NEO_CPU_OK) {
                char why[sizeof(neo_cpu_job::message)];
                std::snprintf(why, sizeof(why), "%s", neo_cpu_last_error());
                return fail(status, "layer %d, stage %d: %s", l, s, why);
            }
            set(stage.answer, number);
            if (times != nullptr) {
                *times++ = began;
                *times++ = now_ns();
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
