#include "codebook_chunks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dalle_fast {
namespace {

template <class T>
T* offset(T* rows, int64_t count) {
    return rows ? rows + count : nullptr;
}

void* offset(void* rows, DType dtype, int64_t count) {
    return rows ? Matrix{rows, dtype, 1, false}.from_row(count).data : nullptr;
}

// Rows first_row to first_row + R, whose logits are, or will be, in the scratch memory.
struct Chunk {
    const ChunkedRows& x;
    const Blas& blas;
    int64_t first_row, R;

    DType dtype() const { return x.hidden.dtype; }
    Matrix hidden() const { return x.hidden.from_row(first_row); }
    LogitRows logits() const { return {R, x.K, x.logits, x.bias}; }

    // What a kernel leaves where the logits were.
    Matrix results() const {
        return {x.logits, dtype(), dtype() == DType::float32 ? x.K : 2 * x.K, false};
    }

    void make_logits() const {
        blas.product(R, x.K, x.I, hidden(), x.weight.t(), {x.logits, DType::float32, x.K, false});
    }

    NoiseRows noise(const NoiseRows& all) const {
        return {all.seed_per_row ? offset(all.seed, first_row) : all.seed, all.seed_per_row, first_row};
    }

    // Adds a.T @ b to a total, or is the first to.
    void accumulate(float* total, int64_t rows, int64_t columns, const Matrix& a, const Matrix& b) const {
        blas.product(rows, columns, R, a.t(), b, {total, DType::float32, columns, false}, first_row > 0);
    }

    // What the chunk, whose results are gradients of logits, contributes.
    void add_gradients(const ProductGradients& all) const {
        if (all.of_hidden) {
            const Matrix of_hidden{all.of_hidden, dtype(), x.I, false};
            blas.product(R, x.I, x.K, results(), x.weight, of_hidden.from_row(first_row));
        }
        if (all.of_weight) accumulate(all.of_weight, x.K, x.I, results(), hidden());
        if (all.of_bias)
            cuda_add_columns({R, x.K, x.logits, dtype(), all.count, all.bias_totals, first_row > 0}, x.stream);
    }
};

template <class Run>
void each_chunk(const ChunkedRows& x, Run run) {
    if (x.N > 0 && x.step < 1) throw std::invalid_argument("step must be at least 1, got " + std::to_string(x.step));
    const Blas blas(x.blas);
    for (int64_t row = 0; row < x.N; row += x.step) run(Chunk{x, blas, row, std::min(x.step, x.N - row)});
}

void finish(const ProductGradients& all, const ChunkedRows& x) {
    if (all.of_bias && x.N > 0)
        cuda_sum_totals({all.count, x.K, all.bias_totals, all.of_bias, x.hidden.dtype}, x.stream);
}

}  // namespace

void cuda_gumbel_chunks(const GumbelChunks& all) {
    each_chunk(all.x, [&](const Chunk& chunk) {
        const int64_t n = chunk.first_row;
        const GumbelStats* const stats = all.stats + n;
        chunk.make_logits();
        cuda_gumbel_forward({chunk.logits(), chunk.noise(all.noise), all.tau, all.embeddings ? all.x.logits : nullptr,
                             chunk.dtype(), all.stats + n, all.kl + n, all.codes + n},
                            all.x.stream);
        if (!all.embeddings) return;
        const Matrix sums{all.sums, DType::float32, all.D, false};
        chunk.blas.product(chunk.R, all.D, all.x.K, chunk.results(), all.codebook, sums);
        cuda_divide_embeddings(
            {chunk.R, all.D, all.sums, stats, offset(all.embeddings, chunk.dtype(), n * all.D), chunk.dtype()},
            all.x.stream);
    });
}

void cuda_gumbel_backward_chunks(const GumbelBackwardChunks& all) {
    each_chunk(all.x, [&](const Chunk& chunk) {
        const int64_t n = chunk.first_row;
        const Matrix grad_embedding = all.grad_embedding.from_row(n);
        const Matrix weights{all.grad_weights, chunk.dtype(), all.x.K, false};  // of the softmax; first their gradient
        chunk.make_logits();
        chunk.blas.product(chunk.R, all.x.K, all.D, grad_embedding, all.codebook.t(), weights);
        cuda_gumbel_backward({chunk.logits(), chunk.noise(all.noise), all.tau, all.stats + n, all.kl + n,
                              offset(all.grad_kl, n), all.grad_weights, all.of_codebook ? all.grad_weights : nullptr,
                              all.x.logits, chunk.dtype()},
                             all.x.stream);
        if (all.of_codebook) chunk.accumulate(all.of_codebook, all.x.K, all.D, weights, grad_embedding);
        chunk.add_gradients(all.gradients);
    });
    finish(all.gradients, all.x);
}

void cuda_sample_chunks(const SampleChunks& all) {
    each_chunk(all.x, [&](const Chunk& chunk) {
        chunk.make_logits();
        cuda_sample({chunk.logits(), chunk.noise(all.noise), all.temperature, all.codes + chunk.first_row},
                    all.x.stream);
    });
}

void cuda_cross_entropy_chunks(const CrossEntropyChunks& all) {
    each_chunk(all.x, [&](const Chunk& chunk) {
        const int64_t n = chunk.first_row;
        chunk.make_logits();
        cuda_cross_entropy({chunk.logits(), all.target + n, all.ignore_index, all.loss + n,
                            all.weight_per_row ? offset(all.row_weight, n) : all.row_weight, all.weight_per_row,
                            all.row_weight ? all.x.logits : nullptr, chunk.dtype()},
                           all.x.stream);
        if (all.row_weight) chunk.add_gradients(all.gradients);
    });
    if (all.row_weight) finish(all.gradients, all.x);
}

}  // namespace dalle_fast
