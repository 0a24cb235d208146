// The CUDA launchers, as C++ files see them: no CUDA headers here. Each throws std::runtime_error (Python's
// RuntimeError) where CUDA reports an error.
#pragma once

#include <cstdint>

#include "../mask.h"

namespace dalle_fast {

// Evaluates the rule for the first seq_len positions, on the device and in the stream that are given.
// out: seq_len x seq_len booleans on the current device, true = attends.
void cuda_dense_mask(const Mask& mask, int32_t seq_len, bool* out, void* stream);

}  // namespace dalle_fast
