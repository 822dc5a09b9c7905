// The functions that ISPC compiles: one set per instruction set, chosen when called.
#pragma once

#include <cstdint>

#include "neo_cpu.h"
#include "piece.h"

extern "C" {
void neo_attend_f16(const NeoPiece *piece);
void neo_attend_bf16(const NeoPiece *piece);
void neo_attend_f32(const NeoPiece *piece);
void neo_load_f16(const void *from, float *to, int32_t n, float factor);
void neo_load_bf16(const void *from, float *to, int32_t n, float factor);
void neo_load_f32(const void *from, float *to, int32_t n, float factor);
void neo_store_f16(const float *from, void *to, int32_t n);
void neo_store_bf16(const float *from, void *to, int32_t n);
float neo_merge(const float *sum_v, const float *reference, const float *sum_w, int32_t parts, int64_t stride,
                int32_t head_dim, float *out);
int32_t neo_read(const NeoPiece *piece, int32_t element_bytes);
int32_t neo_lanes();
}

namespace neo {

// True if this processor has an instruction set that was built; ISPC's own dispatch would abort without.
bool supported() noexcept;

inline int64_t bytes_of(int32_t dtype) noexcept { return dtype == NEO_CPU_FP32 ? 4 : 2; }

void load(int32_t dtype, const void *from, float *to, int32_t n, float factor) noexcept;
void store(int32_t dtype, const float *from, void *to, int32_t n) noexcept;

} // namespace neo
