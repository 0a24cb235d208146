// The codebook operation on the CPU: what the per-instruction-set kernels and the driver share. See ../codebook.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../codebook.h"

namespace dalle_fast {

// Each works on rows begin <= r < end of the chunk. `scratch` holds one row of padded_codes(K) floats.
struct CodebookKernels {
    void (*gumbel_forward)(const GumbelForward&, int64_t begin, int64_t end, float* scratch);
    void (*gumbel_backward)(const GumbelBackward&, int64_t begin, int64_t end, float* scratch);
    void (*sample)(const SampleRows&, int64_t begin, int64_t end, float* scratch);
    void (*cross_entropy)(const CrossEntropyRows&, int64_t begin, int64_t end, float* scratch);
    void (*gumbel_softmax)(const GumbelSoftmaxRows&, int64_t begin, int64_t end, float* scratch);
};

namespace portable { extern const CodebookKernels codebook_kernels; }
namespace avx2 { extern const CodebookKernels codebook_kernels; }
namespace avx512 { extern const CodebookKernels codebook_kernels; }
namespace avx512_bf16 { extern const CodebookKernels codebook_kernels; }

// Rows are shared between threads; results do not depend on how many there are.
void gumbel_forward(const CodebookKernels&, const GumbelForward&, int threads);
void gumbel_backward(const CodebookKernels&, const GumbelBackward&, int threads);
void sample(const CodebookKernels&, const SampleRows&, int threads);
void cross_entropy(const CodebookKernels&, const CrossEntropyRows&, int threads);
void gumbel_softmax(const CodebookKernels&, const GumbelSoftmaxRows&, int threads);

}  // namespace dalle_fast
