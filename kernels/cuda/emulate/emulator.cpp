// Fibers that stand for the threads of a block.

#include <cuda_runtime_api.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include <ucontext.h>

emulator::Place emulator::place;

namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr unsigned LANES = 32;

struct Barrier {
    unsigned expected = 0, arrived = 0;
    uint64_t generation = 0;

    void open_if_complete() {
        if (expected > 0 && arrived == expected) {
            arrived = 0;
            generation++;
        }
    }
};

struct Warp {
    Barrier barrier;
    alignas(16) char lanes[2][LANES][16];
};

struct Pending {
    void *to;
    const void *from;
    bool valid;
    int group;
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    jmp_buf here;
    bool started = false, over = false, awaited = false;
    const Barrier *waits_for = nullptr;
    uint64_t generation = 0;
    unsigned exchanges = 0;
    std::vector<Pending> pending;
    int groups = 0; // ended so far
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    std::vector<char> shared;
    const std::function<void()> *kernel = nullptr;
    bool overlapping = false;
    unsigned running = 0;
    jmp_buf scheduler;
};

Block block;
std::mutex one_at_a_time;

void yield() {
    if (_setjmp(block.fibers[block.running].here) == 0)
        _longjmp(block.scheduler, 1);
}

void wait(Barrier &barrier) {
    Fiber &fiber = block.fibers[block.running];
    const uint64_t generation = barrier.generation;
    barrier.arrived++;
    barrier.open_if_complete();
    if (barrier.generation != generation)
        return;
    fiber.waits_for = &barrier;
    fiber.generation = generation;
    yield();
}

Warp &warp() { return block.warps[block.running / LANES]; }

void body() {
    (*block.kernel)();
    const unsigned me = block.running;
    block.fibers[me].over = true;
    for (Barrier *barrier : {&warp().barrier, &block.barrier}) {
        barrier->expected--;
        barrier->open_if_complete();
    }
    _longjmp(block.scheduler, 1);
}

void start(Fiber &fiber) {
    static ucontext_t context, unused;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    fiber.started = true;
    swapcontext(&unused, &context);
}

// Lets a fiber run until it waits or ends.
void resume(Fiber &fiber) {
    if (_setjmp(block.scheduler) != 0)
        return;
    if (fiber.started)
        _longjmp(fiber.here, 1);
    start(fiber);
}

void run_block(unsigned threads) {
    for (Warp &one : block.warps)
        one.barrier = Barrier{};
    block.barrier = Barrier{};
    block.barrier.expected = threads;
    for (unsigned i = 0; i < threads; i++) {
        Fiber &fiber = block.fibers[i];
        fiber.started = fiber.over = fiber.awaited = false;
        fiber.waits_for = nullptr;
        fiber.exchanges = 0;
        fiber.pending.clear();
        fiber.groups = 0;
        block.warps[i / LANES].barrier.expected++;
    }
    for (unsigned left = threads; left > 0;) {
        bool moved = false;
        for (unsigned i = 0; i < threads; i++) {
            Fiber &fiber = block.fibers[i];
            if (fiber.over || (fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.generation))
                continue;
            fiber.waits_for = nullptr;
            block.running = i;
            emulator::place.thread.x = i;
            resume(fiber);
            moved = true;
            left -= fiber.over ? 1 : 0;
            if (fiber.over && block.overlapping && !fiber.awaited) {
                std::fputs("emulator: a thread ended that has not waited for the kernel ahead\n", stderr);
                std::abort();
            }
        }
        if (!moved) {
            std::fputs("emulator: the threads of a block wait for each other\n", stderr);
            std::abort();
        }
    }
}

} // namespace

void emulator::await_previous() { block.fibers[block.running].awaited = true; }
void emulator::sync_block() { wait(block.barrier); }
void emulator::sync_warp() { wait(warp().barrier); }
char *emulator::dynamic_shared() { return block.shared.data(); }

// Two places in turn: nobody writes one again before all have left the exchange between.
emulator::Lanes emulator::exchange(const void *mine, size_t bytes) {
    auto &lanes = warp().lanes[block.fibers[block.running].exchanges++ % 2];
    std::memcpy(lanes[block.running % LANES], mine, bytes);
    wait(warp().barrier);
    return lanes;
}

void emulator::ask_copy(void *to, const void *from, bool valid) {
    Fiber &fiber = block.fibers[block.running];
    fiber.pending.push_back(Pending{to, from, valid, fiber.groups});
}

void emulator::end_group() { block.fibers[block.running].groups++; }

void emulator::await_groups(int pending) {
    Fiber &fiber = block.fibers[block.running];
    size_t done = 0;
    for (; done < fiber.pending.size() && fiber.pending[done].group < fiber.groups - pending; done++) {
        const Pending &copy = fiber.pending[done];
        if (copy.valid)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
    }
    fiber.pending.erase(fiber.pending.begin(), fiber.pending.begin() + static_cast<std::ptrdiff_t>(done));
}

void emulator::run(dim3 grid, unsigned threads, size_t shared_bytes, bool overlapping,
                   const std::function<void()> &kernel) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (block.fibers.size() < threads)
        block.fibers.resize(threads);
    block.warps.resize((threads + LANES - 1) / LANES);
    block.shared.assign(shared_bytes + 1, static_cast<char>(0xff)); // NaN in every type
    block.kernel = &kernel;
    block.overlapping = overlapping;
    place = Place{dim3(0, 0, 0), dim3(0, 0, 0), dim3(threads), grid};
    for (place.block.z = 0; place.block.z < grid.z; place.block.z++)
        for (place.block.y = 0; place.block.y < grid.y; place.block.y++)
            for (place.block.x = 0; place.block.x < grid.x; place.block.x++)
                run_block(threads);
}

// Few multiprocessors, so that little work is cut often.
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrL2CacheSize: *value = 0; break;
    }
    return cudaSuccess;
}
