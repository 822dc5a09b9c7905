// cuBLASLt has no emulation: arguments are checked, plans cannot be made.
#include "linear.h"

neo_cuda_status neo::lt::open(const Library *&, Handle &) noexcept {
    return fail(NEO_CUDA_UNSUPPORTED, "the emulated library has no matrix products");
}

neo_cuda_status neo::lt::status_of(int, const char *) noexcept { return NEO_CUDA_OK; }

neo_cuda_status neo::tune(const neo_cuda_linear_trial &) {
    return fail(NEO_CUDA_UNSUPPORTED, "the emulated library has no matrix products");
}
