#define KV uint16
#define NAME(x) x##_bf16
#include "kernel.isph"
