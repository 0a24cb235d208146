// What Python hands over, in the terms of kernels.h.
#pragma once

#include <array>
#include <cstdint>

#include "kernels.h"

namespace dalle_fast {

template <class T>
T* address(int64_t number) {
    return reinterpret_cast<T*>(number);
}

using NoiseNumbers = std::array<int64_t, 3>;  // address of seed, one seed a row?, first row

inline NoiseRows to_noise(const NoiseNumbers& n) { return {address<const int64_t>(n[0]), n[1] != 0, n[2]}; }

}  // namespace dalle_fast
