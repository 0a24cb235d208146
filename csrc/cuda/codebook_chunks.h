// The codebook operation by chunks of rows: for each chunk products by cuBLAS and the row kernels of kernels.h, all
// launched from here, since a device is done with most of them before Python could launch the next one.
//
// Of N rows `step` are worked on at a time, in scratch memory that the caller gives: nothing here allocates or waits,
// so that a CUDA graph can hold it all. N rows, K codes, I size of hidden, D size of an embedding: I and D at least 1.
// Errors as in kernels.h and blas.h.
#pragma once

#include "blas.h"
#include "kernels.h"

namespace dalle_fast {

// What all of them are given. Results are in the dtype of hidden and weight, unless their type says otherwise.
struct ChunkedRows {
    int64_t N, K, I, step;
    Matrix hidden, weight;  // (N, I), (K, I)
    const float* bias;      // (K) or null
    float* logits;          // scratch (step, K)
    void* blas;             // torch's handle, whose stream is:
    void* stream;
};

// Gradients of hidden, weight and bias; null: not wanted.
struct ProductGradients {
    void* of_hidden;   // (N, I) contiguous
    float* of_weight;  // (K, I) contiguous
    void* of_bias;     // (K)
    int64_t count;
    float* bias_totals;  // scratch (count, K), see ColumnSums; null only where of_bias is
};

struct GumbelChunks {
    ChunkedRows x;
    NoiseRows noise;  // from row 0
    const float* tau;
    int64_t D;
    Matrix codebook;       // (K, D)
    float* sums;           // scratch (step, D)
    void* embeddings;      // (N, D) contiguous; null: not wanted, and then neither of the two above is looked at
    GumbelStats* stats;    // (N)
    float* kl;             // (N)
    int64_t* codes;        // (N)
};

struct GumbelBackwardChunks {
    ChunkedRows x;
    NoiseRows noise;
    const float* tau;
    int64_t D;
    Matrix codebook, grad_embedding;  // (K, D), (N, D)
    const GumbelStats* stats;
    const float* kl;
    const float* grad_kl;  // (N) or null
    void* grad_weights;    // scratch (step, K) in the dtype
    float* of_codebook;    // (K, D) contiguous; null: not wanted
    ProductGradients gradients;
};

struct SampleChunks {
    ChunkedRows x;
    NoiseRows noise;
    const float* temperature;  // (1) or null
    int64_t* codes;            // (N)
};

struct CrossEntropyChunks {
    ChunkedRows x;
    const int64_t* target;  // (N)
    int64_t ignore_index;
    float* loss;              // (N)
    const float* row_weight;  // (N), (1) or null: no gradients
    bool weight_per_row;
    ProductGradients gradients;
};

void cuda_gumbel_chunks(const GumbelChunks& all);
void cuda_gumbel_backward_chunks(const GumbelBackwardChunks& all);
void cuda_sample_chunks(const SampleChunks& all);
void cuda_cross_entropy_chunks(const CrossEntropyChunks& all);

}  // namespace dalle_fast
