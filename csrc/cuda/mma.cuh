// The tensor cores' product of small 16-bit matrices, as one warp computes it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dalle_fast {
namespace {

// d (16, 8) += a (16, 16) @ b (8, 16).T, float32 sums. With g = lane / 4 and q = lane % 4, a lane's words hold two
// neighbouring columns each: a rows g, g + 8, g, g + 8 at columns 2 q, 2 q, 2 q + 8, 2 q + 8; b row g at columns 2 q,
// 2 q + 8. d: row g columns 2 q, 2 q + 1, then row g + 8.
template <class T>
__device__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);  // tests/simt has its own

#if defined(__CUDACC__)
#define DALLE_FAST_MMA(Type, name)                                                                         \
    template <>                                                                                            \
    __device__ __forceinline__ void mma_16x8x16<Type>(float (&d)[4], const uint32_t (&a)[4],               \
                                                      const uint32_t (&b)[2]) {                            \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                  \
    }
DALLE_FAST_MMA(__half, "f16")
DALLE_FAST_MMA(__nv_bfloat16, "bf16")
#undef DALLE_FAST_MMA
#endif

}  // namespace
}  // namespace dalle_fast
