// The CUDA launchers, as C++ files see them: no CUDA headers here. Each throws std::runtime_error (Python's
// RuntimeError) where CUDA reports an error.
#pragma once

#include <cstdint>

#include "../codebook.h"

namespace dalle_fast {

// CUDA versions, 1000 * major + 10 * minor: the newest one that the machine's driver serves, 0 without a driver, and that
// of the runtime in this module.
struct CudaVersions {
    int driver, runtime;
};
CudaVersions cuda_versions();

// The codebook's row kernels, see ../codebook.h for what they compute. All pointers are the current device's, seeds,
// tau, temperature and row weights included: nothing waits for the device, and a CUDA graph can hold the launch.
// std::invalid_argument (ValueError) unless 0 <= R < 2^31 and 1 <= K <= 2^30.
void cuda_gumbel_forward(const GumbelForward& rows, void* stream);
void cuda_gumbel_backward(const GumbelBackward& rows, void* stream);
void cuda_sample(const SampleRows& rows, void* stream);
// A target outside [0, K) that is not ignore_index gives NaN in that row's loss and gradient.
void cuda_cross_entropy(const CrossEntropyRows& rows, void* stream);
void cuda_gumbel_softmax(const GumbelSoftmaxRows& rows, void* stream);

// The sums of all columns, in as many parts as there are totals: rows are dealt out to them.
struct ColumnSums {
    int64_t R, K;
    void* rows;  // (R, K) results
    DType dtype;
    int64_t count;
    float* totals;  // (count, K)
    bool begun;     // are there totals to add to?
};
void cuda_add_columns(const ColumnSums& columns, void* stream);

// out[k] = the sum of all totals of column k.
struct SumOfTotals {
    int64_t count, K;
    const float* totals;  // (count, K)
    void* out;            // (K)
    DType dtype;          // of out
};
void cuda_sum_totals(const SumOfTotals& totals, void* stream);

// embeddings = sums / sum_noisy of their row, where sums are of weights that are not normalised.
struct EmbeddingRows {
    int64_t R, D;
    const float* sums;  // (R, D) contiguous
    const GumbelStats* stats;
    void* embeddings;     // (R, D) contiguous
    DType dtype;          // of embeddings
};
void cuda_divide_embeddings(const EmbeddingRows& rows, void* stream);

}  // namespace dalle_fast
