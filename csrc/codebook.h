// What happens to one chunk of rows of logits, once they are there: the interface that the CPU's and CUDA's kernels
// have in common. Who computes the products before and after: dalle_fast/ops/codebook/cpu.py on a CPU,
// cuda/codebook_chunks.cpp.
//
// R rows of the chunk, K codes. Plain structures only: this header is compiled once per instruction set.
//
// A matrix of results may be where a float matrix of its size was read: each row is at the start of the memory of a row
// of K floats, also where its elements have 16 bits.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dalle_fast {

// hidden @ weight.T for R rows, to which the kernels add the bias.
struct LogitRows {
    int64_t R, K;
    float* logits;      // (R, K), contiguous
    const float* bias;  // (K) or null
};

// Noise is a function of (seed, row, code) alone.
struct NoiseRows {
    const int64_t* seed;  // (1), or (R) where every row has its own
    bool seed_per_row;    // then the row's number is 0, else first_row + r
    int64_t first_row;
};

// What the forward pass keeps of a row for the backward pass. With t = logit + bias + noise:
// p = exp(logit + bias - max_logit) / sum, y = exp((t - max_noisy) / tau) / sum_noisy. The maxima are apart from the
// sums because a log-sum-exp of logits of 10^4 over a small tau would have no digits left.
struct GumbelStats {
    float max_logit, sum, max_noisy, sum_noisy;
};

struct GumbelForward {
    LogitRows x;
    NoiseRows noise;
    const float* tau;      // (1)
    void* weights;         // (R, K) results: exp((t - max_noisy) / tau), not normalised; null: not wanted. May be logits
    DType dtype;           // of weights
    GumbelStats* stats;    // (R)
    float* kl;             // (R) sum_k p_k (ln p_k + ln K)
    int64_t* codes;        // (R) argmax of t, the first of equals; in [0, K) whatever the logits are
};

struct GumbelBackward {
    LogitRows x;
    NoiseRows noise;
    const float* tau;
    const GumbelStats* stats;
    const float* kl;
    const float* grad_kl;       // (R) or null
    const void* grad_weights;   // (R, K) contiguous: grad_embedding @ codebook.T; float32 on a CPU, in dtype on CUDA
    void* weights;              // (R, K) y; null: not wanted. May be grad_weights. Contiguous on CUDA, else results
    void* grad_logits;          // (R, K) results. May be x.logits
    DType dtype;                // of weights and grad_logits
};

// codes = argmax(logit + bias + temperature * noise); without noise where temperature is null.
struct SampleRows {
    LogitRows x;
    NoiseRows noise;
    const float* temperature;  // (1) or null
    int64_t* codes;            // (R)
};

// loss = -log softmax(logit + bias)[target], 0 where the target is ignore_index; grad_logits of
// sum_r row_weight[r] * loss[r].
struct CrossEntropyRows {
    LogitRows x;
    const int64_t* target;    // (R)
    int64_t ignore_index;
    float* loss;              // (R)
    const float* row_weight;  // (R), or (1) for all rows
    bool weight_per_row;
    void* grad_logits;        // (R, K) results; null: not wanted. May be x.logits
    DType dtype;              // of grad_logits
};

// torch.nn.functional.gumbel_softmax over the last dimension: all of it, as no product comes before or after.
struct GumbelSoftmaxRows {
    int64_t R, K;
    const void* logits;   // (R, K) contiguous
    void* out;            // (R, K) contiguous
    DType dtype;          // of both
    NoiseRows noise;
    float tau;
    int64_t* codes;       // (R) argmax, or null
};

// What may be drawn of logits, in place: those of all other codes become -inf. On a CPU alone.
struct TruncatedRows {
    int64_t R, K;
    float* logits;      // (R, K), contiguous; become (logit - the row's largest) / temperature
    float temperature;  // above 0
    int64_t top_k;      // as many of the largest stay, of equals the first ones; K: all
    float top_p;        // then the fewest of the most likely ones whose probabilities add up to this; 1: all
};

}  // namespace dalle_fast
