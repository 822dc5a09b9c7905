#include "device.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int DEVICES = 64;
std::array<neo::Device, DEVICES> known;
std::array<std::atomic<bool>, DEVICES> ready;

bool unless_zero(const char *variable) noexcept {
    const char *const said = std::getenv(variable);
    return said == nullptr || std::strcmp(said, "0") != 0;
}

std::atomic<bool> &overlap() noexcept {
    static std::atomic<bool> on{unless_zero("NEO_CUDA_PDL")};
    return on;
}

neo_cuda_status ask(int device, cudaDeviceAttr attribute, int &value) noexcept {
    return neo::from_cuda(cudaDeviceGetAttribute(&value, attribute, device), "asking for the device's attributes");
}

neo_cuda_status look(neo::Device &device) noexcept {
    int major = 0, minor = 0;
    NEO_TRY(ask(device.index, cudaDevAttrComputeCapabilityMajor, major));
    NEO_TRY(ask(device.index, cudaDevAttrComputeCapabilityMinor, minor));
    NEO_TRY(ask(device.index, cudaDevAttrMultiProcessorCount, device.multiprocessors));
    NEO_TRY(ask(device.index, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.shared_of_sm));
    NEO_TRY(ask(device.index, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_of_block));
    NEO_TRY(ask(device.index, cudaDevAttrL2CacheSize, device.l2));
    device.capability = 10 * major + minor;
    return NEO_CUDA_OK;
}

} // namespace

// Two threads that look at once write the same numbers; `ready` publishes them.
neo_cuda_status neo::current_device(Device &device) noexcept {
    int index = 0;
    NEO_TRY(from_cuda(cudaGetDevice(&index), "looking for a device"));
    if (index >= DEVICES)
        return fail(NEO_CUDA_UNSUPPORTED, "device %d: at most %d are supported", index, DEVICES);
    if (ready[index].load(std::memory_order_acquire)) {
        device = known[index];
        return NEO_CUDA_OK;
    }
    device.index = index;
    NEO_TRY(look(device));
    if (device.capability < 75)
        return fail(NEO_CUDA_UNSUPPORTED, "the device has compute capability %d.%d, 7.5 or more is needed",
                    device.capability / 10, device.capability % 10);
    static std::atomic_flag writing = ATOMIC_FLAG_INIT;
    if (!writing.test_and_set(std::memory_order_acquire)) {
        known[index] = device;
        ready[index].store(true, std::memory_order_release);
        writing.clear(std::memory_order_release);
    }
    return NEO_CUDA_OK;
}

bool neo::overlap_wanted() noexcept { return overlap().load(std::memory_order_relaxed); }

bool neo::release_wanted() noexcept {
    static const bool on = unless_zero("NEO_CUDA_RELEASE");
    return on;
}

extern "C" int32_t neo_cuda_overlap(int32_t on) {
    return on < 0 ? overlap().load() : overlap().exchange(on != 0);
}

extern "C" neo_cuda_status neo_cuda_describe(neo_cuda_device_info *info) {
    neo::clear_error();
    NEO_NEED_SIZE(info, "info");
    int driver = 0, runtime = 0;
    NEO_TRY(neo::from_cuda(cudaDriverGetVersion(&driver), "asking for the driver's version"));
    NEO_TRY(neo::from_cuda(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version"));
    info->driver = driver;
    info->runtime = runtime;
    neo::Device device{};
    NEO_TRY(neo::current_device(device));
    info->capability = device.capability;
    info->multiprocessors = device.multiprocessors;
    info->shared_bytes = device.shared_of_sm;
    info->l2_bytes = device.l2;
    return NEO_CUDA_OK;
}
