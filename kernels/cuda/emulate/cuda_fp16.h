// __half for the emulator.
#pragma once

#include <cstdint>

using __half = _Float16;
struct __half2 {
    __half low, high;
};
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
