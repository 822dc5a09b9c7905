#include "cublaslt.h"

#include <dlfcn.h>

#include <array>
#include <mutex>

#include "device.h"

namespace {

using namespace neo;

// Newest first. What the process has loaded already (PyTorch brings one) goes before what could be loaded.
constexpr const char *NAMES[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
constexpr int DEVICES = 64;

void *find_library() noexcept {
    for (const int more : {RTLD_NOLOAD, 0})
        for (const char *name : NAMES)
            if (void *found = dlopen(name, RTLD_NOW | RTLD_LOCAL | more))
                return found;
    return nullptr;
}

template <class F> bool take(void *from, const char *name, F *&function) noexcept {
    function = reinterpret_cast<F *>(dlsym(from, name));
    return function != nullptr;
}

// Whether all functions are there.
bool look(lt::Library &library) noexcept {
    void *from = find_library();
    return from != nullptr && take(from, "cublasLtGetVersion", library.version) &&
           take(from, "cublasLtCreate", library.create) &&
           take(from, "cublasLtMatmulDescCreate", library.operation_create) &&
           take(from, "cublasLtMatmulDescDestroy", library.operation_destroy) &&
           take(from, "cublasLtMatmulDescSetAttribute", library.operation_set) &&
           take(from, "cublasLtMatrixLayoutCreate", library.layout_create) &&
           take(from, "cublasLtMatrixLayoutDestroy", library.layout_destroy) &&
           take(from, "cublasLtMatmulPreferenceCreate", library.preference_create) &&
           take(from, "cublasLtMatmulPreferenceDestroy", library.preference_destroy) &&
           take(from, "cublasLtMatmulPreferenceSetAttribute", library.preference_set) &&
           take(from, "cublasLtMatmulAlgoGetHeuristic", library.heuristic) &&
           take(from, "cublasLtMatmulAlgoCheck", library.check) &&
           take(from, "cublasLtMatmulAlgoCapGetAttribute", library.capability) &&
           take(from, "cublasLtMatmulAlgoConfigGetAttribute", library.choice_get) &&
           take(from, "cublasLtMatmulAlgoConfigSetAttribute", library.choice_set) &&
           take(from, "cublasLtMatmul", library.matmul);
}

std::mutex guard;
std::array<lt::Handle, DEVICES> handles; // live as long as the process

} // namespace

neo_cuda_status neo::lt::open(const Library *&library, Handle &handle) noexcept {
    Device device{};
    NEO_TRY(current_device(device));
    const std::lock_guard<std::mutex> lock(guard);
    static Library known;
    static bool there = false; // looked for again where it was not: it may have been loaded since
    if (!there && !(there = look(known)))
        return fail(NEO_CUDA_UNSUPPORTED, "cuBLASLt cannot be loaded: neither %s nor %s is there", NAMES[0], NAMES[1]);
    if (handles[device.index] == nullptr)
        NEO_TRY(status_of(known.create(&handles[device.index]), "opening cuBLASLt"));
    library = &known;
    handle = handles[device.index];
    return NEO_CUDA_OK;
}

neo_cuda_status neo::lt::status_of(int status, const char *doing) noexcept {
    if (status == 0)
        return NEO_CUDA_OK;
    return fail(NEO_CUDA_DEVICE, "%s: cuBLAS answered with status %d", doing, status);
}
