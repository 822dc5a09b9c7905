// Rows of numbers between fp32 and the types that callers use, and the merge of partial sums.

#include "numbers.isph"

#define MINUS_INFINITY floatbits((uniform unsigned int32)0xff800000)

export void neo_load_f16(const uniform float16 from[], uniform float to[], uniform int n, uniform float factor) {
    foreach (i = 0 ... n) to[i] = widen(from[i]) * factor;
}
export void neo_load_bf16(const uniform uint16 from[], uniform float to[], uniform int n, uniform float factor) {
    foreach (i = 0 ... n) to[i] = widen(from[i]) * factor;
}
export void neo_load_f32(const uniform float from[], uniform float to[], uniform int n, uniform float factor) {
    foreach (i = 0 ... n) to[i] = from[i] * factor;
}

export void neo_store_f16(const uniform float from[], uniform float16 to[], uniform int n) {
    foreach (i = 0 ... n) {
        float16 x;
        narrow(from[i], x);
        to[i] = x;
    }
}
export void neo_store_bf16(const uniform float from[], uniform uint16 to[], uniform int n) {
    foreach (i = 0 ... n) {
        uint16 x;
        narrow(from[i], x);
        to[i] = x;
    }
}

// One head from its partial sums, `stride` heads apart: out = sum of V weights / sum of weights, all weights
// taken to the largest reference. Returns the natural log of the sum of exp(scores).
export uniform float neo_merge(const uniform float sum_v[], const uniform float reference[],
                               const uniform float sum_w[], uniform int parts, uniform int64 stride,
                               uniform int head_dim, uniform float out[]) {
    uniform float most = MINUS_INFINITY;
    for (uniform int p = 0; p < parts; p++) most = max(most, reference[p * stride]);
    uniform float total = 0.0f;
    foreach (i = 0 ... head_dim) out[i] = 0.0f;
    for (uniform int p = 0; p < parts; p++) {
        const uniform float factor = exp2_below(reference[p * stride] - most);
        const uniform float *uniform from = sum_v + p * stride * head_dim;
        total += factor * sum_w[p * stride];
        foreach (i = 0 ... head_dim) out[i] += factor * from[i];
    }
    const uniform float inverse = 1.0f / total;
    foreach (i = 0 ... head_dim) out[i] *= inverse;
    return (most + log(total) * 1.44269504f) * 0.69314718f;
}

// What the dispatcher chose: the number of lanes.
export uniform int neo_lanes() { return programCount; }
