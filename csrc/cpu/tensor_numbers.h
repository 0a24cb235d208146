// A tensor as Python hands it over: its address, and the strides of its four dimensions in elements.
#pragma once

#include <array>
#include <cstdint>

#include "attention.h"

namespace dalle_fast {

using TensorNumbers = std::array<int64_t, 5>;  // address 0 for none

inline Strided to_strided(const TensorNumbers& n) { return {reinterpret_cast<char*>(n[0]), n[1], n[2], n[3], n[4]}; }

}  // namespace dalle_fast
