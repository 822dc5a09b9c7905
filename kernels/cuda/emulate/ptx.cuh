// The emulator's counterpart of ptx/ptx.cuh: registers of a warp laid out as the PTX manual's figures for ldmatrix,
// movmatrix and mma.m16n8k16 have them.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "../numbers.cuh"

namespace neo {

inline uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(static_cast<const char *>(pointer) - emulator::dynamic_shared());
}

// Shared memory serves 128 bytes at once if they lie in different banks: of 16-byte words, different numbers modulo 8.
inline void need_banks_apart(uint32_t &taken, uint32_t address, const char *what) {
    const uint32_t bank = 1u << address / 16 % 8;
    if ((taken & bank) != 0) {
        std::fprintf(stderr, "emulator: %s: a bank conflict in shared memory\n", what);
        std::abort();
    }
    taken |= bank;
}

// All lanes call it. What they take from one half of a line (64 bytes) arrives together and is written together.
inline void copy_16(uint32_t to, const void *from, bool valid) {
    struct Copy {
        uint64_t from;
        uint32_t to;
    };
    const Copy mine{reinterpret_cast<uintptr_t>(from), to};
    const emulator::Lanes lanes = emulator::exchange(&mine, sizeof(mine));
    uint32_t taken = 0, seen = 0;
    for (int lane = 0; lane < 32; lane++) {
        const auto other = emulator::from_lane<Copy>(lanes, lane);
        const uint32_t word = 1u << other.from / 16 % 4;
        if (other.from / 64 != mine.from / 64 || (seen & word) != 0) // twice: past the end of a sequence
            continue;
        seen |= word;
        need_banks_apart(taken, other.to, "cp.async");
    }
    emulator::ask_copy(emulator::dynamic_shared() + to, from, valid);
}
inline void end_group() { emulator::end_group(); }
inline void await_groups(int pending) { emulator::await_groups(pending); }

// Rows r and r + 1 of column c of an 8x8 matrix whose row i begins at rows[i].
template <class Rows> uint32_t column_pair(const Rows &rows, int r, int c) {
    uint16_t low, high;
    std::memcpy(&low, rows(r) + 2 * c, 2);
    std::memcpy(&high, rows(r + 1) + 2 * c, 2);
    return low | static_cast<uint32_t>(high) << 16;
}

inline void load_transposed(uint32_t (&a)[4], uint32_t address) {
    const emulator::Lanes lanes = emulator::exchange(&address, sizeof(address));
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        uint32_t taken = 0;
        for (int r = 0; r < 8; r++)
            need_banks_apart(taken, emulator::from_lane<uint32_t>(lanes, 8 * i + r), "ldmatrix");
        const auto rows = [&](int r) {
            return emulator::dynamic_shared() + emulator::from_lane<uint32_t>(lanes, 8 * i + r);
        };
        a[i] = column_pair(rows, lane % 4 * 2, lane / 4);
    }
}

inline uint32_t transpose(uint32_t a) {
    const emulator::Lanes lanes = emulator::exchange(&a, sizeof(a));
    const int lane = threadIdx.x % 32;
    uint16_t row[2][8]; // the two that this lane needs: 2 * (lane % 4) and the next
    for (int r = 0; r < 2; r++)
        for (int q = 0; q < 4; q++)
            std::memcpy(&row[r][2 * q], lanes[(lane % 4 * 2 + r) * 4 + q], 4);
    return row[0][lane / 4] | static_cast<uint32_t>(row[1][lane / 4]) << 16;
}

template <class T> float half_of(uint32_t pair, int which) {
    const uint16_t bits = static_cast<uint16_t>(which == 0 ? pair : pair >> 16);
    T value;
    std::memcpy(&value, &bits, 2);
    return to_float(value);
}

// Lane 4g + t holds, in pairs from low to high: a0 A[g][2t], a1 A[g+8][2t], a2 A[g][2t+8], a3 A[g+8][2t+8];
// b0 B[2t][g], b1 B[2t+8][g] (pairs down the column); c0 C[g][2t], c1 C[g][2t+1], c2 and c3 likewise of row g+8.
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    float A[2][16], B[16][2]; // rows g and g + 8; columns 2t and 2t + 1
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const emulator::Lanes of_a = emulator::exchange(a, sizeof(a));
    for (int from = 0; from < 4; from++)
        for (int i = 0; i < 4; i++) {
            uint32_t pair;
            std::memcpy(&pair, of_a[4 * g + from] + 4 * i, 4);
            for (int h = 0; h < 2; h++)
                A[i % 2][2 * from + h + 8 * (i / 2)] = half_of<T>(pair, h);
        }
    const emulator::Lanes of_b = emulator::exchange(b, sizeof(b));
    for (int n = 0; n < 2; n++)
        for (int from = 0; from < 4; from++)
            for (int i = 0; i < 2; i++) {
                uint32_t pair;
                std::memcpy(&pair, of_b[4 * (2 * t + n) + from] + 4 * i, 4);
                for (int h = 0; h < 2; h++)
                    B[2 * from + h + 8 * i][n] = half_of<T>(pair, h);
            }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++)
            c[i] += A[i / 2][k] * B[k][i % 2];
}

inline void stay_packed(uint32_t (&)[4]) {}

inline uint32_t load_acquire(const uint32_t *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline void store_release(uint32_t *flag, uint32_t value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline uint64_t now_ns() {
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                     std::chrono::steady_clock::now().time_since_epoch())
                                     .count());
}

// Kernels run one after the other here.
inline void await_previous() { emulator::await_previous(); }
inline void release_next() {}

template <class... Parameters, class... Args>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   const Args &...args) {
    emulator::run(grid, static_cast<unsigned>(threads), shared_bytes, false, [&] { kernel(args...); });
}

template <class... Parameters, class... Args>
void launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                        const Args &...args) {
    emulator::run(grid, static_cast<unsigned>(threads), shared_bytes, true, [&] { kernel(args...); });
}

} // namespace neo

#define NEO_DYNAMIC_SHARED(name) char *const name = ::emulator::dynamic_shared()
