// The row kernels of the codebook on the host. The first number of a request is the function.
#include "../../csrc/cuda/codebook.cu"
#include "serve.h"

using namespace dalle_fast;
using serve::buffer;
using serve::number;

namespace {

DType dtype() { return DType(number()); }
LogitRows logit_rows() {
    const int64_t R = number(), K = number();
    float* logits = buffer<float>();
    return {R, K, logits, buffer<float>()};
}
NoiseRows noise_rows() {
    const bool per_row = number() != 0;
    return {buffer<int64_t>(), per_row, number()};
}

void call() {
    switch (number()) {
        case 0: {  // words of Philox for a key (2 words) and a counter (4)
            const uint32_t* in = buffer<uint32_t>();
            uint32_t* out = buffer<uint32_t>();
            const auto words = philox4x32_10({{in[2], in[3], in[4], in[5]}}, in[0], in[1]);
            for (int w = 0; w < 4; ++w) out[w] = uint32_t(words.word[w]);
            return;
        }
        case 1: {  // words to noise
            const int64_t count = number();
            const uint32_t* in = buffer<uint32_t>();
            float* out = buffer<float>();
            for (int64_t n = 0; n < count; ++n) out[n] = gumbel_noise<ScalarLanes>(in[n]);
            return;
        }
        case 2: {
            GumbelForward a{};
            a.x = logit_rows();
            a.noise = noise_rows();
            a.tau = buffer<float>();
            a.weights = buffer<void>();
            a.dtype = dtype();
            a.stats = buffer<GumbelStats>();
            a.kl = buffer<float>();
            a.codes = buffer<int64_t>();
            return cuda_gumbel_forward(a, nullptr);
        }
        case 3: {
            GumbelBackward a{};
            a.x = logit_rows();
            a.noise = noise_rows();
            a.tau = buffer<float>();
            a.stats = buffer<GumbelStats>();
            a.kl = buffer<float>();
            a.grad_kl = buffer<float>();
            a.grad_weights = buffer<void>();
            a.weights = buffer<void>();
            a.grad_logits = buffer<void>();
            a.dtype = dtype();
            return cuda_gumbel_backward(a, nullptr);
        }
        case 4: {
            SampleRows a{};
            a.x = logit_rows();
            a.noise = noise_rows();
            a.temperature = buffer<float>();
            a.codes = buffer<int64_t>();
            return cuda_sample(a, nullptr);
        }
        case 5: {
            CrossEntropyRows a{};
            a.x = logit_rows();
            a.target = buffer<int64_t>();
            a.ignore_index = number();
            a.loss = buffer<float>();
            a.row_weight = buffer<float>();
            a.weight_per_row = number() != 0;
            a.grad_logits = buffer<void>();
            a.dtype = dtype();
            return cuda_cross_entropy(a, nullptr);
        }
        case 6: {
            GumbelSoftmaxRows a{};
            a.R = number();
            a.K = number();
            a.logits = buffer<void>();
            a.out = buffer<void>();
            a.dtype = dtype();
            a.noise = noise_rows();
            const int64_t tau = number();  // its bits
            std::memcpy(&a.tau, &tau, sizeof(float));
            a.codes = buffer<int64_t>();
            return cuda_gumbel_softmax(a, nullptr);
        }
        case 7: {  // words of all codes of a row
            const int64_t row = number(), K = number();
            const int64_t* seed = buffer<int64_t>();
            uint32_t* out = buffer<uint32_t>();
            for (int64_t k = 0; k < K; ++k)
                out[k] = uint32_t(philox_words(uint64_t(*seed), uint64_t(row), noise_counter(k)).word[noise_word(k)]);
            return;
        }
        case 8: {
            ColumnSums a{};
            a.R = number();
            a.K = number();
            a.rows = buffer<void>();
            a.dtype = dtype();
            a.count = number();
            a.totals = buffer<float>();
            a.begun = number() != 0;
            return cuda_add_columns(a, nullptr);
        }
        case 9: {
            SumOfTotals a{};
            a.count = number();
            a.K = number();
            a.totals = buffer<float>();
            a.out = buffer<void>();
            a.dtype = dtype();
            return cuda_sum_totals(a, nullptr);
        }
        case 10: {
            EmbeddingRows a{};
            a.R = number();
            a.D = number();
            a.sums = buffer<float>();
            a.stats = buffer<GumbelStats>();
            a.embeddings = buffer<void>();
            a.dtype = dtype();
            return cuda_divide_embeddings(a, nullptr);
        }
        default: throw std::invalid_argument("no such function");
    }
}

}  // namespace

int main() { serve::requests(call); }
