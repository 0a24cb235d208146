// A linear layer of few rows: out (R, N) = x (R, K) @ weight (N, K)^T + bias, the weights read once and where they lie, and
// perhaps GELU of that.
//
// What one token after another needs. Libraries pack the weights for every product, which costs more than a product of
// few rows. Plain structures only, as in attention.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace dalle_fast {

struct LinearArgs {
    int64_t R, N, K;
    const float* x;        // (R, K), contiguous; rounded to bfloat16 where the matrix unit multiplies that
    DType dtype;           // of weight and bias
    const void* weight;    // (N, K); a row's elements lie side by side
    int64_t stride_weight; // of rows, in elements
    const void* bias;      // (N), contiguous, or null
    float* out;            // (R, N), contiguous
    bool gelu;
    const void* packed;    // what LinearKernels::pack made of x
};

struct LinearKernels {
    size_t (*packed_bytes)(const LinearArgs&);  // 0 where x is read as it is
    void (*pack)(const LinearArgs&, void* packed);
    void (*columns)(const LinearArgs&, int64_t begin, int64_t end);  // those of out
};

namespace portable { extern const LinearKernels linear_kernels; }
namespace avx2 { extern const LinearKernels linear_kernels; }
namespace avx512 { extern const LinearKernels linear_kernels; }
namespace avx512_bf16 { extern const LinearKernels linear_kernels; }
namespace avx512_amx { extern const LinearKernels linear_kernels; }

// An element of the result depends on its row of x alone, not on the other rows or on `threads`.
void linear(const LinearKernels&, const LinearArgs&, int threads);

}  // namespace dalle_fast
