// Decode attention on tensor cores: a worker's way through its tiles, bringing one, taking one. See attention_mma.cuh.
#pragma once

#include <ptx.cuh>

#include "attention.h"

namespace neo {

constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ int tiles_of(int length) { return (length + TILE - 1) / TILE; }

// A tile in a worker's run.
struct Cursor {
    int row, unit, tile, length, tiles; // tiles: of this row
    int begin;                          // the unit's first place in the line

    __device__ int place() const { return begin + UNIT_COST + tile; }
    __device__ int next_place() const { return place() + 1 + (tile + 1 == tiles ? UNIT_COST : 0); }
};

__device__ __forceinline__ Cursor begin(const Start &start, int place) {
    return Cursor{start.row,    start.unit,             max(start.offset - UNIT_COST, 0),
                  start.length, tiles_of(start.length), place - start.offset};
}

// To the next tile, which is there.
__device__ __forceinline__ void advance(const Attention &args, Cursor &at) {
    if (++at.tile < at.tiles)
        return;
    at.tile = 0;
    at.begin += UNIT_COST + at.tiles;
    if (++at.unit < args.units)
        return;
    at.unit = 0;
    do {
        at.length = args.lengths[++at.row];
    } while (at.length <= 0);
    at.tiles = tiles_of(at.length);
}

// Brings tiles into shared memory.
template <class T, int D> struct Loader {
    static constexpr int ROUNDS = D / 16;               // of 32 lanes times 16 bytes, for K and for V each
    static constexpr bool WHOLE = D % 64 == 0;          // rows of V are whole lines of 128 bytes
    static constexpr int V_ROW = v_row_bytes(D);
    static constexpr int V_PLANE = 2 * TILE * D;        // where V begins, bytes
    static constexpr int CHUNKS = D / 8;                // of 16 bytes in a row of V

    const Attention &args;
    Cursor at;
    const int32_t *table;
    int entry = 0;       // this lane's of 32 table entries
    int first = 0;       // index of the first of them; -1: none
    const int lane;

    __device__ Loader(const Attention &a, const Cursor &start, int lane_) : args(a), at(start), lane(lane_) {
        find_table();
    }

    // Where the 8 tokens of a half of row d of K lie, in words of 16 bytes. A line of 128 bytes of the cache becomes a line
    // of shared memory, which takes it at once: of blocks of 8, 8 rows of a half; of larger ones, both halves of 4 rows
    // (or 2), which change places in every other 4 rows so that the 8 rows of a matrix lie in 8 different words of a line.
    static __device__ int k_word(int d, int half, int block_shift) {
        return block_shift == 3 ? half * D + d : 2 * d + (half ^ (d >> 2 & 1));
    }
    static __device__ uint32_t k_step_bytes(int block_shift) { return block_shift == 3 ? 256 : 512; } // of 16 rows

    __device__ void find_table() {
        const int64_t slot = args.slots == nullptr ? at.row : args.slots[at.row];
        table = args.tables + slot * args.table_stride;
        first = -1;
    }

    __device__ int block_of(int token) {
        const int index = token >> args.block_shift;
        if (first < 0 || index < first || index >= first + 32) { // the same for all lanes
            first = index;
            const int last = (at.length - 1) >> args.block_shift;
            entry = table[min(index + lane, last)];
        }
        return __shfl_sync(ALL, entry, index - first);
    }

    // Block and offset of the 8 tokens from `token` on, in elements of the cache.
    __device__ int64_t block_start(int token) {
        const int last = at.length - 1;
        return block_of(token <= last ? token : last) * args.block_stride;
    }

    __device__ void load(uint32_t to) {
        const T *head = static_cast<const T *>(args.cache) + (at.unit / args.cuts) * args.head_stride;
        const int token = at.tile * TILE;
        const int mask = (1 << args.block_shift) - 1;
        const int64_t start0 = block_start(token);
        const int64_t start1 = args.block_shift == 3 ? block_start(token + 8) : start0;
        const int offset0 = token & mask, offset1 = (token + 8) & mask;

        const bool second = (lane & 1) != 0;
        const T *k = head + (second ? start1 + offset1 : start0 + offset0) + ((lane >> 1) << args.block_shift);
        const uint32_t k_to = to + k_word(lane >> 1, lane & 1, args.block_shift) * 16;
        const uint32_t k_to_step = k_step_bytes(args.block_shift);
        const int64_t k_step = int64_t{16} << args.block_shift;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            copy_16(k_to + i * k_to_step, k + i * k_step, true);

        const int valid = at.length - token; // rows of V behind the end may be NaN, which a weight of 0 does not remove
        const T *v = head + (D << args.block_shift);
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int chunk = i * 32 + lane;
            const int t = chunk / CHUNKS, j = chunk % CHUNKS;
            const int64_t row = t < 8 ? start0 + (offset0 + t) * D : start1 + (offset1 + t - 8) * D;
            copy_16(to + V_PLANE + t * V_ROW + (WHOLE ? j ^ (t & 7) : j) * 16, v + row + j * 8, t < valid);
        }
    }

    // Whether the tile has the token that this step has appended.
    __device__ bool is_newest() const { return at.tile + 1 == at.tiles; }

    __device__ void next() {
        const int row = at.row;
        advance(args, at);
        if (at.row != row)
            find_table();
    }
};

// Running softmax of one unit: N times 8 query heads.
template <class T, int D, int N> struct Sums {
    uint32_t q[N][D / 16][2];
    float o[N][D / 16][4]; // rows (d) lane / 4 and + 8, columns (heads) 2 * (lane % 4) and + 1
    float max[N][2], sum[N][2];

    __device__ void begin(const Attention &args, const Cursor &at, int lane) {
        const int in_group = (at.unit % args.cuts) * HEADS_OF_MMA * N;
        const T *row = static_cast<const T *>(args.q) + at.row * args.q_stride +
                       (at.unit / args.cuts * args.group + in_group) * args.q_head_stride;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int head = n * HEADS_OF_MMA + lane / 4;
            const bool there = in_group + head < args.group;
            const T *d = row + (there ? head : 0) * args.q_head_stride + (lane % 4) * 2;
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                q[n][k][0] = there ? *reinterpret_cast<const uint32_t *>(d + k * 16) : 0u;
                q[n][k][1] = there ? *reinterpret_cast<const uint32_t *>(d + k * 16 + 8) : 0u;
                o[n][k][0] = o[n][k][1] = o[n][k][2] = o[n][k][3] = 0.f;
            }
            max[n][0] = max[n][1] = -INFINITY;
            sum[n][0] = sum[n][1] = 0.f;
        }
    }

    __device__ void take(uint32_t tile, int valid, int block_shift, float scale_log2, int lane) {
        using Tile = Loader<T, D>;
        const int i = lane / 8, r = lane % 8;
        const uint32_t k_at = tile + Tile::k_word((i >> 1) * 8 + r, i & 1, block_shift) * 16;
        const uint32_t k_step = Tile::k_step_bytes(block_shift);
        // Words 2 k and 2 k + 1 of rows of V; where rows are whole lines, word w of row t has changed places with w ^ t % 8.
        const uint32_t v_row = tile + Tile::V_PLANE + ((i >> 1) * 8 + r) * Tile::V_ROW;
        const uint32_t v_at = v_row + (Tile::WHOLE ? (i & 1) ^ r : i & 1) * 16;
        float s[2][N][4] = {}; // two chains of sums, for half the waiting
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[4];
            load_transposed(a, k_at + k * k_step);
#pragma unroll
            for (int n = 0; n < N; n++)
                mma(s[k % 2][n], a, q[n][k], T{});
        }
        float x[N][4], m[N][2];
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++)
                x[n][c] = lane / 4 + (c < 2 ? 0 : 8) < valid ? (s[0][n][c] + s[1][n][c]) * scale_log2 : -INFINITY;
            m[n][0] = fmaxf(x[n][0], x[n][2]);
            m[n][1] = fmaxf(x[n][1], x[n][3]);
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) // outside, for 2 N shuffles at once
#pragma unroll
            for (int j = 0; j < 2 * N; j++)
                m[j / 2][j % 2] = fmaxf(m[j / 2][j % 2], __shfl_xor_sync(ALL, m[j / 2][j % 2], step));
        uint32_t p[N][2];
#pragma unroll
        for (int n = 0; n < N; n++) {
            float alpha[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float most = fmaxf(m[n][h], max[n][h]);
                alpha[h] = exp2f(max[n][h] - most);
                max[n][h] = most;
                x[n][h] = exp2f(x[n][h] - most);
                x[n][h + 2] = exp2f(x[n][h + 2] - most);
                sum[n][h] = sum[n][h] * alpha[h] + x[n][h] + x[n][h + 2];
            }
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                o[n][k][0] *= alpha[0];
                o[n][k][1] *= alpha[1];
                o[n][k][2] *= alpha[0];
                o[n][k][3] *= alpha[1];
            }
            p[n][0] = transpose(pack(x[n][0], x[n][1], T{}));
            p[n][1] = transpose(pack(x[n][2], x[n][3], T{}));
        }
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[4];
            load_transposed(a, Tile::WHOLE ? (v_at ^ k % 4 * 32) + k / 4 * 128 : v_at + k * 32);
#pragma unroll
            for (int n = 0; n < N; n++)
                mma(o[n][k], a, p[n], T{});
        }
    }

    // Sums over all tokens, which lanes of the same columns share.
    __device__ void end() {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                for (int step = 4; step < 32; step *= 2)
                    sum[n][h] += __shfl_xor_sync(ALL, sum[n][h], step);
    }

    // Calls put(head of the unit, d, value) for every element, divided by the sum of weights if `whole`.
    template <class Put> __device__ void each(int lane, bool whole, Put put) const {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int head = n * HEADS_OF_MMA + 2 * (lane % 4) + h;
                const float by = whole ? 1.f / sum[n][h] : 1.f;
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    put(head, k * 16 + lane / 4, o[n][k][h] * by);
                    put(head, k * 16 + lane / 4 + 8, o[n][k][h + 2] * by);
                }
            }
    }
};

} // namespace neo
