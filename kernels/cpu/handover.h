// CPU attention of a whole step, asked for layer by layer.
#pragma once

#include "job.h"

namespace neo {

// Serves every layer; each request is waited for with this patience.
neo_cpu_status serve(const neo_cpu_handover &handover, neo_cpu_pool *pool, const Patience &patience) noexcept;
// Sets all answers to their last number. A hand-over that cannot be read is left alone.
void release(const neo_cpu_handover &handover) noexcept;

} // namespace neo
