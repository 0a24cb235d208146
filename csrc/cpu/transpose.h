// 16 x 16 words of 32 bits, transposed in registers.
//
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

typedef int32_t Word __attribute__((may_alias));
typedef int32_t Words __attribute__((vector_size(64)));
typedef int32_t UnalignedWords __attribute__((vector_size(64), aligned(4), may_alias));

DF_INLINE void store_words(Word* p, const Words& x) { *reinterpret_cast<UnalignedWords*>(p) = x; }

// For a shuffle: of every 2 w lanes the first w, or the last w ones; the first vector's, then the second's.
template <int w>
struct FirstHalves {
    static constexpr int at(int x) { return x & w ? 16 + x - w : x; }
};
template <int w>
struct SecondHalves {
    static constexpr int at(int x) { return x & w ? 16 + x : x + w; }
};

// One step of the transpose: exchanges the halves of size `w` of rows x and x + w.
template <int w>
DF_INLINE void transpose_step(Words* rows) {
#pragma GCC unroll 16
    for (int x = 0; x < 16; ++x)
        if (!(x & w)) {
            const Words a = rows[x], b = rows[x + w];
            rows[x] = shuffle<FirstHalves<w>>(a, b);
            rows[x + w] = shuffle<SecondHalves<w>>(a, b);
        }
}

DF_INLINE void transpose(Words (&rows)[16]) {
    transpose_step<8>(rows);
    transpose_step<4>(rows);
    transpose_step<2>(rows);
    transpose_step<1>(rows);
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
