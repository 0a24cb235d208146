// The tensor cores' product for the host: the definition of mma.m16n8k16 in the PTX manual, from the matrices' side.
#pragma once

#include "../../csrc/cuda/codebook_row.cuh"
#include "../../csrc/cuda/mma.cuh"

namespace dalle_fast {
namespace {

float element(uint32_t word, int n, __half) { return to_float(__half{uint16_t(word >> 16 * n)}); }
float element(uint32_t word, int n, __nv_bfloat16) { return to_float(__nv_bfloat16{uint16_t(word >> 16 * n)}); }

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto* words = simt::exchange(kAllLanes, mine, 6);
    const auto a_of = [&](int row, int column) {
        const int lane = row % 8 * 4 + column % 8 / 2;
        return element(words[lane][row / 8 + column / 8 * 2], column % 2, T());
    };
    const auto b_of = [&](int k, int n) { return element(words[n * 4 + k % 8 / 2][4 + k / 8], k % 2, T()); };
    const int lane = int(threadIdx.x % kWarp);
    for (int n = 0; n < 4; ++n) {
        const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        for (int k = 0; k < 16; ++k) d[n] += a_of(row, k) * b_of(k, column);
    }
}

}  // namespace
}  // namespace dalle_fast
