#define KV float
#define NAME(x) x##_f32
#include "kernel.isph"
