// What happens to rows of logits, see ../codebook.h: one block a row, one kernel a function, one launch a chunk.
//
// A row is read twice, the second time most likely from the L2 cache, where the matrix product has just left it. Noise
// is dearer than memory: what a thread made of it in the first pass it keeps in shared memory for the second, as long
// as the row fits; no other thread sees it, so that takes no barrier. Longer rows compute their noise again.
//
// Every result is the same in every run: no atomics, and the order of sums depends on K alone.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.cuh"
#include "codebook_row.cuh"
#include "kernels.h"

namespace dalle_fast {
namespace {

constexpr int kMaxThreads = 256, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxKeptBytes = 40 << 10;  // with the reductions' scratch within the 48 KB that need no opt-in
constexpr int64_t kMaxK = int64_t(1) << 30, kMaxRows = 0x7fffffff;

// -- forward ----------------------------------------------------------------------------------------------------------

struct Maxima {
    float logit;
    Best noisy;
};

struct CombineMaxima {
    __device__ Maxima operator()(const Maxima& a, const Maxima& b) const {
        return {fmaxf(a.logit, b.logit), Better()(a.noisy, b.noisy)};
    }
};

struct ForwardSums {
    float sum, dot, noisy;  // of e = exp(z - max), of e (z - max), of the weights
};

struct CombineForwardSums {
    __device__ ForwardSums operator()(const ForwardSums& a, const ForwardSums& b) const {
        return {a.sum + b.sum, a.dot + b.dot, a.noisy + b.noisy};
    }
};

template <class T, bool kKept>
__global__ void __launch_bounds__(kMaxThreads) gumbel_forward_kernel(GumbelForward a) {
    __shared__ Maxima maxima_scratch[kMaxWarps];
    __shared__ ForwardSums sums_scratch[kMaxWarps];
    DALLE_FAST_DYNAMIC_SHARED(Four, kept);  // logit + bias + noise
    const int64_t row = blockIdx.x;
    const unsigned K = unsigned(a.x.K), counters = num_counters(K);
    const float* logits = a.x.logits + row * a.x.K;  // with float32 these are the weights too
    const RowNoise noise = noise_of_row(a.noise, row);

    Maxima mine = {-INFINITY, {-INFINITY, kNoCode}};
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        const Four z = load_logits(logits, a.x.bias, K, c), t = plus(z, noise_of(noise, c));
        for (int w = 0; w < kCodes; ++w) mine.logit = fmaxf(mine.logit, z.of[w]);
        take_better(mine.noisy, c, t);
        if (kKept) kept[c] = t;
    }
    const Maxima max = block_reduce(mine, maxima_scratch, CombineMaxima());

    T* weights = static_cast<T*>(a.weights);
    const float scale = exponent_scale(*a.tau);
    ForwardSums part = {0, 0, 0};
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        const Four z = load_logits(logits, a.x.bias, K, c), t = kKept ? kept[c] : plus(z, noise_of(noise, c));
        Four weight;
        for (int w = 0; w < kCodes; ++w) {
            const float delta = z.of[w] - max.logit, e = exp2f(delta * kLog2e);
            part.sum += e;
            part.dot += e == 0 ? 0.0f : e * delta;  // delta may be -inf
            weight.of[w] = exp2f((t.of[w] - max.noisy.value) * scale);
            part.noisy += weight.of[w];
        }
        if (weights) store_codes(weights + row * a.x.K, K, c, weight);
    }
    const ForwardSums sums = block_reduce(part, sums_scratch, CombineForwardSums());

    if (threadIdx.x == 0) {
        a.stats[row] = {max.logit, sums.sum, max.noisy.value, sums.noisy};
        // Not ln K - ln(sum), which would cancel.
        a.kl[row] = sums.dot / sums.sum - logf(sums.sum / float(K));
        a.codes[row] = found_code(max.noisy);
    }
}

// -- backward ---------------------------------------------------------------------------------------------------------

template <class T, bool kKept>
__global__ void __launch_bounds__(kMaxThreads) gumbel_backward_kernel(GumbelBackward a) {
    __shared__ float dot_scratch[kMaxWarps];
    DALLE_FAST_DYNAMIC_SHARED(Four, kept);  // y times its sum
    const int64_t row = blockIdx.x, start = row * a.x.K;
    const unsigned K = unsigned(a.x.K), counters = num_counters(K);
    const float* logits = a.x.logits + start;
    const float* grad_weights = a.grad_weights + start;
    const RowNoise noise = noise_of_row(a.noise, row);
    const GumbelStats stats = a.stats[row];
    const float tau = *a.tau, scale = exponent_scale(tau), inverse_tau = reciprocal_of_tau(tau);
    const float inverse_sum = 1.0f / stats.sum, inverse_noisy = 1.0f / stats.sum_noisy;

    const auto weights_of = [&](const Four& z, unsigned c) {
        Four weight = plus(z, noise_of(noise, c));
        for (int w = 0; w < kCodes; ++w) weight.of[w] = exp2f((weight.of[w] - stats.max_noisy) * scale);
        return weight;
    };

    float part = 0;
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        const Four weight = weights_of(load_logits(logits, a.x.bias, K, c), c);
        for (int w = 0; w < kCodes; ++w)
            if (const unsigned code = code_of(c, w); code < K) part += weight.of[w] * grad_weights[code];
        if (kKept) kept[c] = weight;
    }
    const float dot = block_reduce(part, dot_scratch, Plus()) * inverse_noisy;

    // grad_logits and weights may be where logits and grad_weights are: a thread reads only what it alone writes.
    T* grad_logits = static_cast<T*>(a.grad_logits) + start;
    T* y_out = a.weights ? static_cast<T*>(a.weights) + start : nullptr;
    const float grad_kl = a.grad_kl ? a.grad_kl[row] : 0.0f;
    const float offset = -logf(stats.sum / float(K)) - a.kl[row];  // ln p + ln K - kl = z - max + offset
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        // Logits that were kept as weights are wanted again for the KL alone.
        Four z = {};
        if (!kKept || a.grad_kl) z = load_logits(logits, a.x.bias, K, c);
        const Four weight = kKept ? kept[c] : weights_of(z, c);
        Four y, grad;
        for (int w = 0; w < kCodes; ++w) {
            const unsigned code = code_of(c, w);
            y.of[w] = weight.of[w] * inverse_noisy;
            grad.of[w] = code < K ? y.of[w] * (grad_weights[code] - dot) * inverse_tau : 0.0f;
            if (a.grad_kl) {
                const float delta = z.of[w] - stats.max_logit, e = exp2f(delta * kLog2e);
                grad.of[w] += e == 0 ? 0.0f : grad_kl * (e * inverse_sum) * (delta + offset);
            }
        }
        store_codes(grad_logits, K, c, grad);
        if (y_out) store_codes(y_out, K, c, y);
    }
}

// -- samples ----------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kMaxThreads) sample_kernel(SampleRows a) {
    __shared__ Best scratch[kMaxWarps];
    const int64_t row = blockIdx.x;
    const unsigned K = unsigned(a.x.K), counters = num_counters(K);
    const float* logits = a.x.logits + row * a.x.K;
    const bool noisy = a.temperature != nullptr;
    const float temperature = noisy ? *a.temperature : 0.0f;
    const RowNoise noise = noisy ? noise_of_row(a.noise, row) : RowNoise{0, 0};

    Best mine = {-INFINITY, kNoCode};
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        Four t = load_logits(logits, a.x.bias, K, c);
        if (noisy) {
            const Four g = noise_of(noise, c);
            for (int w = 0; w < kCodes; ++w) t.of[w] += temperature * g.of[w];
        }
        take_better(mine, c, t);
    }
    const Best best = block_reduce(mine, scratch, Better());
    if (threadIdx.x == 0) a.codes[row] = found_code(best);
}

// -- cross-entropy ----------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kMaxThreads) cross_entropy_kernel(CrossEntropyRows a) {
    __shared__ float max_scratch[kMaxWarps], sum_scratch[kMaxWarps];
    const int64_t row = blockIdx.x, target = a.target[row];
    const unsigned K = unsigned(a.x.K), counters = num_counters(K);
    const float* logits = a.x.logits + row * a.x.K;
    T* grad_logits = a.grad_logits ? static_cast<T*>(a.grad_logits) + row * a.x.K : nullptr;

    // The whole block leaves here, so that nobody waits for it. Neither an ignored row's logits nor those of a target
    // that is no code matter, not even if they are NaN; the second gives NaN rather than an access out of bounds.
    const bool ignored = target == a.ignore_index;
    if (ignored || target < 0 || target >= a.x.K) {
        const float result = ignored ? 0.0f : NAN;
        if (threadIdx.x == 0) a.loss[row] = result;
        if (grad_logits)
            for (unsigned k = threadIdx.x; k < K; k += blockDim.x) store(grad_logits + k, result);
        return;
    }
    // Before the first barrier: grad_logits may be where logits are.
    const float target_logit = logits[target] + (a.x.bias ? a.x.bias[target] : 0.0f);

    RunningSum mine = {-INFINITY, 0};
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x)
        add_exponentials(mine, load_logits(logits, a.x.bias, K, c), kLog2e);
    const float max = block_reduce(mine.max, max_scratch, Larger());
    const float sum = block_reduce(rescaled_sum(mine, max, kLog2e), sum_scratch, Plus());
    if (threadIdx.x == 0) a.loss[row] = logf(sum) - (target_logit - max);
    if (!grad_logits) return;

    const float weight = a.row_weight[a.weight_per_row ? row : 0], inverse_sum = 1.0f / sum;
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        Four grad = load_logits(logits, a.x.bias, K, c);
        for (int w = 0; w < kCodes; ++w) {
            const float p = exp2f((grad.of[w] - max) * kLog2e) * inverse_sum;
            grad.of[w] = weight * (p - (code_of(c, w) == target ? 1.0f : 0.0f));
        }
        store_codes(grad_logits, K, c, grad);
    }
}

// -- Gumbel-softmax of given logits -----------------------------------------------------------------------------------

template <class T, bool kKept>
__global__ void __launch_bounds__(kMaxThreads) gumbel_softmax_kernel(GumbelSoftmaxRows a) {
    __shared__ Best best_scratch[kMaxWarps];
    __shared__ float sum_scratch[kMaxWarps];
    DALLE_FAST_DYNAMIC_SHARED(Four, kept);  // logit + noise
    const int64_t row = blockIdx.x;
    const unsigned K = unsigned(a.K), counters = num_counters(K);
    const T* logits = static_cast<const T*>(a.logits) + row * a.K;
    const RowNoise noise = noise_of_row(a.noise, row);
    const float scale = exponent_scale(a.tau);

    Best mine = {-INFINITY, kNoCode};
    RunningSum part = {-INFINITY, 0};
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        const Four t = plus(load_logits(logits, nullptr, K, c), noise_of(noise, c));
        take_better(mine, c, t);
        add_exponentials(part, t, scale);
        if (kKept) kept[c] = t;
    }
    const Best best = block_reduce(mine, best_scratch, Better());
    const float sum = block_reduce(rescaled_sum(part, best.value, scale), sum_scratch, Plus());
    if (threadIdx.x == 0 && a.codes) a.codes[row] = found_code(best);

    const float inverse_sum = 1.0f / sum;
    for (unsigned c = threadIdx.x; c < counters; c += blockDim.x) {
        Four y = kKept ? kept[c] : plus(load_logits(logits, nullptr, K, c), noise_of(noise, c));
        for (int w = 0; w < kCodes; ++w) y.of[w] = exp2f((y.of[w] - best.value) * scale) * inverse_sum;
        store_codes(static_cast<T*>(a.out) + row * a.K, K, c, y);
    }
}

// -- launches ---------------------------------------------------------------------------------------------------------

template <class Rows>
void launch(const char* what, void (*kernel)(Rows), const Rows& rows, int64_t R, int64_t K, size_t shared,
            void* stream) {
    // Whole warps, and no more of them than have something to do.
    const unsigned threads = std::min(unsigned(kMaxThreads), (num_counters(K) + kWarp - 1) / kWarp * kWarp);
    Rows copy = rows;
    void* args[] = {&copy};
    check_cuda(cudaLaunchKernel(kernel, dim3(unsigned(R)), dim3(threads), args, shared,
                                static_cast<cudaStream_t>(stream)),
               what);
}

// Is there anything to do?
bool check_sizes(int64_t R, int64_t K) {
    if (R < 0 || R > kMaxRows) throw std::invalid_argument("R must be 0 to 2^31 - 1, got " + std::to_string(R));
    if (K < 1 || K > kMaxK) throw std::invalid_argument("K must be 1 to 2^30, got " + std::to_string(K));
    return R > 0;
}

size_t kept_bytes(int64_t K) {
    const size_t bytes = num_counters(K) * sizeof(Four);
    return bytes <= kMaxKeptBytes ? bytes : 0;
}

// run(a value of the type)
template <class Run>
void with_type(CodebookDType dtype, Run run) {
    switch (dtype) {
        case CodebookDType::float32: return run(float());
        case CodebookDType::float16: return run(__half());
        case CodebookDType::bfloat16: return run(__nv_bfloat16());
    }
    throw std::invalid_argument("dtype must be 0, 1 or 2, got " + std::to_string(int32_t(dtype)));
}

}  // namespace

void cuda_gumbel_forward(const GumbelForward& a, void* stream) {
    if (!check_sizes(a.x.R, a.x.K)) return;
    const size_t kept = kept_bytes(a.x.K);
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        launch("launching gumbel_forward_kernel",
               kept ? gumbel_forward_kernel<T, true> : gumbel_forward_kernel<T, false>, a, a.x.R, a.x.K, kept, stream);
    });
}

void cuda_gumbel_backward(const GumbelBackward& a, void* stream) {
    if (!check_sizes(a.x.R, a.x.K)) return;
    const size_t kept = kept_bytes(a.x.K);
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        launch("launching gumbel_backward_kernel",
               kept ? gumbel_backward_kernel<T, true> : gumbel_backward_kernel<T, false>, a, a.x.R, a.x.K, kept,
               stream);
    });
}

void cuda_sample(const SampleRows& a, void* stream) {
    if (check_sizes(a.x.R, a.x.K)) launch("launching sample_kernel", sample_kernel, a, a.x.R, a.x.K, 0, stream);
}

void cuda_cross_entropy(const CrossEntropyRows& a, void* stream) {
    if (!check_sizes(a.x.R, a.x.K)) return;
    with_type(a.dtype, [&](auto type) {
        launch("launching cross_entropy_kernel", cross_entropy_kernel<decltype(type)>, a, a.x.R, a.x.K, 0, stream);
    });
}

void cuda_gumbel_softmax(const GumbelSoftmaxRows& a, void* stream) {
    if (!check_sizes(a.R, a.K)) return;
    const size_t kept = kept_bytes(a.K);
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        launch("launching gumbel_softmax_kernel",
               kept ? gumbel_softmax_kernel<T, true> : gumbel_softmax_kernel<T, false>, a, a.R, a.K, kept, stream);
    });
}

}  // namespace dalle_fast
