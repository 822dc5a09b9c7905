#define KV float16
#define NAME(x) x##_f16
#include "kernel.isph"
