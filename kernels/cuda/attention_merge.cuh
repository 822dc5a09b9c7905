// Decode attention on tensor cores: results of a unit, and parts of it that workers have left. See attention_mma.cuh.
#pragma once

#include "attention_tile.cuh"

namespace neo {

// Writes what a worker found of a unit; where others have parts of it, who comes last merges them.
template <class T, int D, int N> struct Finish {
    static constexpr int HEADS = HEADS_OF_MMA * N;
    const Attention &args;
    const int worker, lane;

    __device__ T *out_of(const Cursor &at, int head) const {
        return static_cast<T *>(args.out) + at.row * args.out_stride +
               (at.unit / args.cuts * args.group + (at.unit % args.cuts) * HEADS + head) * args.out_head_stride;
    }
    __device__ int heads_of(const Cursor &at) const { return min(HEADS, args.group - (at.unit % args.cuts) * HEADS); }

    __device__ void whole(const Cursor &at, const Sums<T, D, N> &sums) const {
        const int heads = heads_of(at);
        sums.each(lane, true, [&](int head, int d, float value) {
            if (head < heads)
                out_of(at, head)[d] = from_float<T>(value);
        });
    }

    // A worker keeps two parts: one that begins where its run begins, and its last one.
    __device__ void part(const Cursor &at, const Sums<T, D, N> &sums, bool at_start) const {
        const int heads = heads_of(at);
        const int64_t mine = 2 * worker + (at_start ? 0 : 1);
        float *to = args.plan.sum_v + mine * HEADS * D;
        sums.each(lane, false, [&](int head, int d, float value) {
            if (head < heads)
                to[head * D + d] = value;
        });
        if (lane < 4)
#pragma unroll
            for (int n = 0; n < N; n++)
                for (int h = 0; h < 2; h++)
                    args.plan.max_and_sum[mine * HEADS + n * HEADS_OF_MMA + 2 * lane + h] =
                        make_float2(sums.max[n][h], sums.sum[n][h]);
        const int run = args.plan.run[0], begin = at.begin + UNIT_COST;
        Parts parts{begin / run, (begin + at.tiles - 1) / run, 1, 0};
        parts.first_is_second = parts.first * run < at.begin ? 1 : 0;
        int others = parts.last - parts.first;
        if (others >= GROUP) {
            const int lead = parts.first + (worker - parts.first) / GROUP * GROUP;
            const Parts group{lead, min(lead + GROUP - 1, parts.last), 1, lead == parts.first ? parts.first_is_second : 0};
            if (!is_last(args.plan.grouped + group.place(lead), group.last - lead))
                return;
            merge(at, group, false);
            parts.step = GROUP;
            others /= GROUP;
        }
        if (is_last(args.plan.arrived + at.row * args.units + at.unit, others))
            merge(at, parts, true);
    }

    // Of workers first, first + step, ... up to last: all but the first one's begin where their runs begin.
    struct Parts {
        int first, last, step, first_is_second;
        __device__ int64_t place(int w) const { return 2 * w + (w == first ? first_is_second : 0); }
    };

    // Whether so many others have come before; what they wrote is then to be seen.
    __device__ bool is_last(int32_t *counter, int others) const {
        __threadfence();
        __syncwarp();
        int before = 0;
        if (lane == 0)
            before = atomicAdd(counter, 1);
        before = __shfl_sync(ALL, before, 0);
        if (before != others)
            return false;
        __threadfence();
        if (lane == 0)
            *counter = 0;
        return true;
    }

    __device__ float2 stats(const Parts &parts, int w, int head) const {
        return __ldcg(&args.plan.max_and_sum[parts.place(w) * HEADS + head]);
    }

    // Into the result, or into the first of the parts. All heads at once, and maxima with the sums they belong to, so that
    // many loads are under way: a merge takes about as long as one answer of the L2 cache.
    __device__ void merge(const Cursor &at, const Parts &parts, bool whole) const {
        constexpr int AT_ONCE = 4; // times 4 elements of a lane
        const int heads = heads_of(at), elements = heads * D;
        for (int base = lane * 4; base - lane * 4 < elements; base += AT_ONCE * 128) {
            float4 o[AT_ONCE];
            float max[AT_ONCE], sum[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                o[i] = make_float4(0.f, 0.f, 0.f, 0.f);
                max[i] = -INFINITY;
                sum[i] = 0.f;
            }
#pragma unroll 2
            for (int w = parts.first; w <= parts.last; w += parts.step) {
                const float4 *from = reinterpret_cast<const float4 *>(args.plan.sum_v + parts.place(w) * HEADS * D);
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    const int element = min(base + i * 128, elements - 4);
                    const float2 of = stats(parts, w, element / D);
                    const float4 v = __ldcg(from + element / 4);
                    const float most = fmaxf(max[i], of.x), keep = exp2f(max[i] - most), weight = exp2f(of.x - most);
                    max[i] = most;
                    sum[i] = sum[i] * keep + weight * of.y;
                    o[i].x = o[i].x * keep + weight * v.x;
                    o[i].y = o[i].y * keep + weight * v.y;
                    o[i].z = o[i].z * keep + weight * v.z;
                    o[i].w = o[i].w * keep + weight * v.w;
                }
            }
            float *const raw = args.plan.sum_v + parts.place(parts.first) * HEADS * D;
            __syncwarp(); // lanes behind the end have read the last word
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int element = base + i * 128;
                if (element >= elements)
                    break;
                if (!whole) {
                    *reinterpret_cast<float4 *>(raw + element) = o[i];
                    continue;
                }
                const float by = 1.f / sum[i];
                uint32_t *const out = reinterpret_cast<uint32_t *>(out_of(at, element / D) + element % D);
                out[0] = pack(o[i].x * by, o[i].y * by, T{});
                out[1] = pack(o[i].z * by, o[i].w * by, T{});
            }
        }
        if (!whole)
            merge_stats(parts);
    }

    // Of a group: its maxima and sums become those of its first part.
    __device__ void merge_stats(const Parts &parts) const {
        const int head = lane % HEADS;
        float max = -INFINITY, sum = 0.f;
        for (int w = parts.first; w <= parts.last; w += parts.step) {
            const float2 of = stats(parts, w, head);
            const float most = fmaxf(max, of.x);
            sum = sum * exp2f(max - most) + of.y * exp2f(of.x - most);
            max = most;
        }
        __syncwarp(); // all have read them
        if (lane < HEADS)
            args.plan.max_and_sum[parts.place(parts.first) * HEADS + head] = make_float2(max, sum);
    }
};

} // namespace neo
