// What numbers in memory are. The order is that of DTYPES in dalle_fast/ops/dtypes.py.
#pragma once

#include <cstdint>

namespace dalle_fast {

enum class DType : int32_t { float32, float16, bfloat16 };

}  // namespace dalle_fast
