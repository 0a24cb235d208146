// The codebook operation on the CPU: what the per-instruction-set kernels and the driver share. See ../codebook.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../codebook.h"
#include "product.h"

namespace dalle_fast {

// Logits (without bias) of some rows and codes, wherever they lie. Where the first code is not 0, it is a multiple of
// kNoiseBlock.
struct LogitTile {
    Piece of;  // rows and codes
    const float* logits;
    int64_t stride;  // from row to row
};

// What a tile says about a row. Of all tiles of the row together they are its code and its loss.
struct BestCode {
    float value;
    int64_t code;  // the first of those with this value; any of [0, K) where the value is -inf
};
struct ExpSum {
    float most, sum;  // sum of exp(logit - most); `most` is finite unless a logit is +inf
};

// Of the arguments the tile's kernels leave x.logits and the results aside. The others work on rows begin <= r < end of
// the chunk; their `scratch` holds one row of K floats.
struct CodebookKernels {
    void (*gumbel_forward)(const GumbelForward&, int64_t begin, int64_t end, float* scratch);
    void (*gumbel_backward)(const GumbelBackward&, int64_t begin, int64_t end, float* scratch);
    void (*cross_entropy)(const CrossEntropyRows&, int64_t begin, int64_t end, float* scratch);
    void (*gumbel_softmax)(const GumbelSoftmaxRows&, int64_t begin, int64_t end, float* scratch);
    void (*truncate)(const TruncatedRows&, int64_t begin, int64_t end, float* scratch);
    void (*best_codes)(const SampleRows&, const LogitTile&, BestCode* of_rows);
    void (*exp_sums)(const CrossEntropyRows&, const LogitTile&, ExpSum* of_rows);
};

namespace portable { extern const CodebookKernels codebook_kernels; }
namespace avx2 { extern const CodebookKernels codebook_kernels; }
namespace avx512 { extern const CodebookKernels codebook_kernels; }
namespace avx512_bf16 { extern const CodebookKernels codebook_kernels; }
namespace avx512_amx { extern const CodebookKernels codebook_kernels; }

// Work is shared between threads; results do not depend on how many there are.
void gumbel_forward(const CodebookKernels&, const GumbelForward&, int threads);
void gumbel_backward(const CodebookKernels&, const GumbelBackward&, int threads);
void sample(const CodebookKernels&, const SampleRows&, int threads);
void cross_entropy(const CodebookKernels&, const CrossEntropyRows&, int threads);
void gumbel_softmax(const CodebookKernels&, const GumbelSoftmaxRows&, int threads);
void truncate(const CodebookKernels&, const TruncatedRows&, int threads);

// The logits' factors, hidden (R, Din) and weight (K, Din), in place of the logits of all rows.
struct LogitFactors {
    Operand hidden, weight;
    int64_t depth;
};

// As above, with x.logits null; the loss without gradients.
void sample_streaming(const CodebookKernels&, const ProductKernels&, const SampleRows&, const LogitFactors&, int threads);
void cross_entropy_streaming(const CodebookKernels&, const ProductKernels&, const CrossEntropyRows&, const LogitFactors&,
                             int threads);

}  // namespace dalle_fast
