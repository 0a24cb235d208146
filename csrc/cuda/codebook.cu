// What happens to rows of logits, see ../codebook.h: one block a row, one kernel a function, one launch a chunk. And
// what little there is to do to the products of a chunk.
//
// A row is read twice, the second time most likely from the L2 cache, where the matrix product has just left it. Noise
// is dearer than memory: what a thread made of it in the first pass it keeps in shared memory for the second, as long
// as the row fits; no other thread sees it, so that takes no barrier. Longer rows compute their noise again.
//
// Every result is the same in every run: no atomics, and the order of sums depends on K alone, that of columns on R and
// on the number of totals.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "check.cuh"
#include "codebook_row.cuh"
#include "kernels.h"

namespace dalle_fast {
namespace {

// Of a block. A multiprocessor has room for 768 threads with a row kernel's registers. As blocks of 128, a chunk's 512
// rows of 8,192 codes are all at work at once, 4 on most of 132 multiprocessors; as blocks of 256 a quarter of them would
// wait for the others and then have the multiprocessors to themselves, too few to hide any latency.
constexpr int kMaxThreads = 128, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxKeptBytes = 40 << 10;  // with the reductions' scratch within the 48 KB that need no opt-in
constexpr int64_t kMaxK = int64_t(1) << 30, kMaxRows = 0x7fffffff;

// -- forward ----------------------------------------------------------------------------------------------------------

struct Maxima {
    float logit, noisy;
};

struct CombineMaxima {
    __device__ Maxima operator()(const Maxima& a, const Maxima& b) const {
        return {fmaxf(a.logit, b.logit), fmaxf(a.noisy, b.noisy)};
    }
};

struct ForwardSums {
    float sum, dot, noisy;  // of e = exp(z - max), of e (z - max), of the weights
    unsigned code;          // the first that has the largest noisy logit
};

struct CombineForwardSums {
    __device__ ForwardSums operator()(const ForwardSums& a, const ForwardSums& b) const {
        return {a.sum + b.sum, a.dot + b.dot, a.noisy + b.noisy, a.code < b.code ? a.code : b.code};
    }
};

// Times e = 0, -inf would be NaN.
__device__ float finite_above(float delta) { return fmaxf(delta, -FLT_MAX); }

template <class T, bool kPacked, bool kKept>
__global__ void __launch_bounds__(kMaxThreads) gumbel_forward_kernel(GumbelForward a) {
    __shared__ Maxima maxima_scratch[kMaxWarps];
    __shared__ ForwardSums sums_scratch[kMaxWarps];
    DALLE_FAST_DYNAMIC_SHARED(Four, kept);  // logit + bias + noise
    const int64_t row = blockIdx.x;
    const unsigned items = num_items(a.x.K);
    const auto logits = logits_of_row<kPacked>(a.x, row);
    const RowNoise noise = noise_of_row(a.noise, row);

    Maxima mine = {-INFINITY, -INFINITY};
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
        const Item z = logits.load(item), t = plus(z, noise_of_item(noise, item));
        mine = {larger_of(mine.logit, z), larger_of(mine.noisy, t)};
        if (kKept) keep(kept, items, item, t);
    }
    const Maxima max = block_reduce(mine, maxima_scratch, CombineMaxima());

    const float scale = exponent_scale(*a.tau);
    ForwardSums part = {0, 0, 0, kNoCode};
    for (unsigned first = 0; first < items; first += blockDim.x) {
        const unsigned item = first + threadIdx.x;
        Item weight;
        if (item < items) {
            const Item z = logits.load(item);
            const Item t = kKept ? kept_item(kept, items, item) : plus(z, noise_of_item(noise, item));
#pragma unroll
            for (int n = 0; n < kItemCodes; ++n) {
                const float delta = z.of[n] - max.logit, e = exp2_of(delta * kLog2e);
                part.sum += e;
                part.dot += e * finite_above(delta);
                weight.of[n] = exp2_of((t.of[n] - max.noisy) * scale);
                part.noisy += weight.of[n];
            }
            if (mine.noisy == max.noisy) {  // of few threads, so that this costs the others nothing
#pragma unroll
                for (int n = 0; n < kItemCodes; ++n)
                    if (t.of[n] == max.noisy && part.code == kNoCode) part.code = code_of_item(item, n);
            }
        }
        if (a.weights) {
            before_store_in_place<T>();
            if (item < items) store_item(result_row<T, kPacked>(a.weights, row, a.x.K), item, weight);
        }
    }
    const ForwardSums sums = block_reduce(part, sums_scratch, CombineForwardSums());

    if (threadIdx.x == 0) {
        a.stats[row] = {max.logit, sums.sum, max.noisy, sums.noisy};
        // Not ln K - ln(sum), which would cancel.
        a.kl[row] = sums.dot / sums.sum - logf(sums.sum / float(a.x.K));
        a.codes[row] = found_code(sums.code, a.x.K);
    }
}

// -- backward ---------------------------------------------------------------------------------------------------------

// Of rows that are not packed ptxas is told of fewer blocks than it would aim at: for 8 of them on sm_100 it spills.
template <class T, bool kPacked, bool kKept>
__global__ void __launch_bounds__(kMaxThreads, kPacked ? 0 : 5) gumbel_backward_kernel(GumbelBackward a) {
    __shared__ float dot_scratch[kMaxWarps];
    DALLE_FAST_DYNAMIC_SHARED(Four, kept);  // y times its sum
    const int64_t row = blockIdx.x;
    const unsigned items = num_items(a.x.K);
    const auto logits = logits_of_row<kPacked>(a.x, row);
    const Row<const T, kPacked> grad_weights{static_cast<const T*>(a.grad_weights) + row * a.x.K, unsigned(a.x.K)};
    const RowNoise noise = noise_of_row(a.noise, row);
    const GumbelStats stats = a.stats[row];
    const float tau = *a.tau, scale = exponent_scale(tau), inverse_tau = reciprocal_of_tau(tau);
    const float inverse_noisy = 1.0f / stats.sum_noisy;

    const auto weights_of = [&](const Item& z, unsigned item) {
        Item weight = plus(z, noise_of_item(noise, item));
#pragma unroll
        for (float& w : weight.of) w = exp2_of((w - stats.max_noisy) * scale);
        return weight;
    };

    float part = 0;
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
        const Item weight = weights_of(logits.load(item), item);
        const Item of_weights = load_item(grad_weights, item, 0.0f);
#pragma unroll
        for (int n = 0; n < kItemCodes; ++n) part += weight.of[n] * of_weights.of[n];
        if (kKept) keep(kept, items, item, weight);
    }
    const float dot = block_reduce(part, dot_scratch, Plus()) * inverse_noisy;

    const float of_kl = a.grad_kl ? a.grad_kl[row] / stats.sum : 0.0f;
    const float offset = -logf(stats.sum / float(a.x.K)) - a.kl[row];  // ln p + ln K - kl = z - max + offset
    for (unsigned first = 0; first < items; first += blockDim.x) {
        const unsigned item = first + threadIdx.x;
        Item y, grad;
        if (item < items) {
            // Logits that were kept as weights are wanted again for the KL alone.
            Item z = {};
            if (!kKept || a.grad_kl) z = logits.load(item);
            const Item weight = kKept ? kept_item(kept, items, item) : weights_of(z, item);
            const Item of_weights = load_item(grad_weights, item, 0.0f);
#pragma unroll
            for (int n = 0; n < kItemCodes; ++n) {
                y.of[n] = weight.of[n] * inverse_noisy;
                grad.of[n] = y.of[n] * (of_weights.of[n] - dot) * inverse_tau;
            }
            if (a.grad_kl) {
#pragma unroll
                for (int n = 0; n < kItemCodes; ++n) {
                    const float delta = z.of[n] - stats.max_logit, e = exp2_of(delta * kLog2e);
                    grad.of[n] += of_kl * e * (finite_above(delta) + offset);
                }
            }
        }
        before_store_in_place<T>();
        if (item < items) {
            store_item(result_row<T, kPacked>(a.grad_logits, row, a.x.K), item, grad);
            // Where this thread alone has read grad_weights, of the same width.
            if (a.weights)
                store_item(Row<T, kPacked>{static_cast<T*>(a.weights) + row * a.x.K, unsigned(a.x.K)}, item, y);
        }
    }
}

// -- samples ----------------------------------------------------------------------------------------------------------

template <bool kPacked, bool kNoisy>
__global__ void __launch_bounds__(kMaxThreads) sample_kernel(SampleRows a) {
    __shared__ Best scratch[kMaxWarps];
    const int64_t row = blockIdx.x;
    const unsigned items = num_items(a.x.K);
    const auto logits = logits_of_row<kPacked>(a.x, row);
    const float temperature = kNoisy ? *a.temperature : 0.0f;
    const RowNoise noise = kNoisy ? noise_of_row(a.noise, row) : RowNoise{0, 0};

    Best mine = {-INFINITY, kNoCode};
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
        Item t = logits.load(item);
        if (kNoisy) {
            const Item g = noise_of_item(noise, item);
#pragma unroll
            for (int n = 0; n < kItemCodes; ++n) t.of[n] += temperature * g.of[n];
        }
        take_better(mine, item, t);
    }
    const Best best = block_reduce(mine, scratch, Better());
    if (threadIdx.x == 0) a.codes[row] = found_code(best.code, a.x.K);
}

// -- cross-entropy ----------------------------------------------------------------------------------------------------

template <class T, bool kPacked>
__global__ void __launch_bounds__(kMaxThreads) cross_entropy_kernel(CrossEntropyRows a) {
    __shared__ float max_scratch[kMaxWarps], sum_scratch[kMaxWarps];
    const int64_t row = blockIdx.x, target = a.target[row];
    const unsigned items = num_items(a.x.K);
    const auto logits = logits_of_row<kPacked>(a.x, row);

    // The whole block leaves here, so that nobody waits for it. Neither an ignored row's logits nor those of a target
    // that is no code matter, not even if they are NaN; the second gives NaN rather than an access out of bounds.
    const bool ignored = target == a.ignore_index;
    if (ignored || target < 0 || target >= a.x.K) {
        const float result = ignored ? 0.0f : NAN;
        if (threadIdx.x == 0) a.loss[row] = result;
        if (a.grad_logits) {
            Item same;
            for (float& x : same.of) x = result;
            for (unsigned item = threadIdx.x; item < items; item += blockDim.x)
                store_item(result_row<T, kPacked>(a.grad_logits, row, a.x.K), item, same);
        }
        return;
    }
    // Before the first barrier: grad_logits may be where logits are.
    const float target_logit = logits.logits.codes[target] + (a.x.bias ? a.x.bias[target] : 0.0f);

    RunningSum mine = {-INFINITY, 0};
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x)
        add_exponentials(mine, logits.load(item), kLog2e);
    const float max = block_reduce(mine.max, max_scratch, Larger());
    const float sum = block_reduce(rescaled_sum(mine, max, kLog2e), sum_scratch, Plus());
    if (threadIdx.x == 0) a.loss[row] = logf(sum) - (target_logit - max);
    if (!a.grad_logits) return;

    const float weight = a.row_weight[a.weight_per_row ? row : 0], inverse_sum = 1.0f / sum;
    for (unsigned first = 0; first < items; first += blockDim.x) {
        const unsigned item = first + threadIdx.x;
        Item grad;
        if (item < items) {
            grad = logits.load(item);
#pragma unroll
            for (int n = 0; n < kItemCodes; ++n) {
                const float p = exp2_of((grad.of[n] - max) * kLog2e) * inverse_sum;
                grad.of[n] = weight * (p - (code_of_item(item, n) == target ? 1.0f : 0.0f));
            }
        }
        before_store_in_place<T>();
        if (item < items) store_item(result_row<T, kPacked>(a.grad_logits, row, a.x.K), item, grad);
    }
}

// -- Gumbel-softmax of given logits -----------------------------------------------------------------------------------

template <class T, bool kPacked, bool kKept>
__global__ void __launch_bounds__(kMaxThreads) gumbel_softmax_kernel(GumbelSoftmaxRows a) {
    __shared__ Best best_scratch[kMaxWarps];
    __shared__ float sum_scratch[kMaxWarps];
    DALLE_FAST_DYNAMIC_SHARED(Four, kept);  // logit + noise
    const int64_t row = blockIdx.x;
    const unsigned items = num_items(a.K);
    const LogitsOfRow<T, kPacked> logits{{static_cast<const T*>(a.logits) + row * a.K, unsigned(a.K)}, nullptr};
    const RowNoise noise = noise_of_row(a.noise, row);
    const float scale = exponent_scale(a.tau);

    Best mine = {-INFINITY, kNoCode};
    RunningSum part = {-INFINITY, 0};
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
        const Item t = plus(logits.load(item), noise_of_item(noise, item));
        take_better(mine, item, t);
        add_exponentials(part, t, scale);
        if (kKept) keep(kept, items, item, t);
    }
    const Best best = block_reduce(mine, best_scratch, Better());
    const float sum = block_reduce(rescaled_sum(part, best.value, scale), sum_scratch, Plus());
    if (threadIdx.x == 0 && a.codes) a.codes[row] = found_code(best.code, a.K);

    const float inverse_sum = 1.0f / sum;
    const Row<T, kPacked> out{static_cast<T*>(a.out) + row * a.K, unsigned(a.K)};
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
        Item y = kKept ? kept_item(kept, items, item) : plus(logits.load(item), noise_of_item(noise, item));
#pragma unroll
        for (float& x : y.of) x = exp2_of((x - best.value) * scale) * inverse_sum;
        store_item(out, item, y);
    }
}

// -- sums of columns --------------------------------------------------------------------------------------------------

constexpr int kColumns = 64, kColumnThreads = kColumns / kCodes, kSlices = 16, kSumThreads = kSlices * kColumnThreads;

// Blocks of 64 columns would be too few for a GPU, so the rows are dealt out to `count` of them, each with a total of
// its own: 16 rows to the first, 16 to the next, and so on. A thread has 4 of the columns and one of the 16 rows.
template <class T, bool kPacked>
__global__ void __launch_bounds__(kSumThreads) add_columns_kernel(ColumnSums a) {
    __shared__ float parts[kSlices][kColumns];
    const unsigned K = unsigned(a.K), thread = threadIdx.x % kColumnThreads, slice = threadIdx.x / kColumnThreads;
    const unsigned column_blocks = (K + kColumns - 1) / kColumns, number = blockIdx.x / column_blocks;
    const unsigned first_column = blockIdx.x % column_blocks * kColumns, first = first_column + thread * kCodes;
    float sums[kCodes] = {};
#pragma unroll 4
    for (int64_t r = number * kSlices + slice; r < a.R; r += a.count * kSlices) {
        const Row<T, kPacked> row = result_row<T, kPacked>(a.rows, r, a.K);
        if constexpr (kPacked) {
            if (first < K) {
                const auto pack = *reinterpret_cast<const Pack<T>*>(row.codes + first);
                for (int n = 0; n < kCodes; ++n) sums[n] += to_float(pack.of[n]);
            }
        } else {
            for (int n = 0; n < kCodes; ++n)
                if (first + n < K) sums[n] += to_float(row.codes[first + n]);
        }
    }
    for (int n = 0; n < kCodes; ++n) parts[slice][thread * kCodes + n] = sums[n];
    __syncthreads();
    const unsigned column = first_column + threadIdx.x;
    if (threadIdx.x >= kColumns || column >= K) return;
    float* const total = a.totals + number * a.K + column;
    float sum = a.begun ? *total : 0;
    for (int n = 0; n < kSlices; ++n) sum += parts[n][threadIdx.x];
    *total = sum;
}

// A thread has a column.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) sum_totals_kernel(SumOfTotals a) {
    const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= a.K) return;
    float sum = 0;
    for (int64_t n = 0; n < a.count; ++n) sum += a.totals[n * a.K + column];
    to_type(static_cast<T*>(a.out) + column, sum);
}

// -- embeddings -------------------------------------------------------------------------------------------------------

// A warp has a row.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) divide_embeddings_kernel(EmbeddingRows a) {
    const int64_t row = int64_t(blockIdx.x) * kMaxWarps + threadIdx.x / kWarp;
    if (row >= a.R) return;
    const float sum = a.stats[row].sum_noisy;
    for (int64_t n = row * a.D + threadIdx.x % kWarp; n < (row + 1) * a.D; n += kWarp)
        to_type(static_cast<T*>(a.embeddings) + n, a.sums[n] / sum);
}

// -- launches ---------------------------------------------------------------------------------------------------------

template <class Rows>
void launch(const char* what, void (*kernel)(Rows), const Rows& rows, int64_t blocks, unsigned threads, size_t shared,
            void* stream) {
    Rows copy = rows;
    void* args[] = {&copy};
    check_cuda(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), args, shared,
                                static_cast<cudaStream_t>(stream)),
               what);
}

// Of a block for a row of K codes: whole warps, and no more of them than have something to do.
unsigned threads_of(int64_t K) {
    return std::min(unsigned(kMaxThreads), (num_items(K) + kWarp - 1) / kWarp * kWarp);
}

// Is there anything to do?
bool check_sizes(int64_t R, int64_t K) {
    if (R < 0 || R > kMaxRows) throw std::invalid_argument("R must be 0 to 2^31 - 1, got " + std::to_string(R));
    if (K < 1 || K > kMaxK) throw std::invalid_argument("K must be 1 to 2^30, got " + std::to_string(K));
    return R > 0;
}

size_t kept_bytes(int64_t K) {
    const size_t bytes = num_items(K) * sizeof(Item);
    return bytes <= kMaxKeptBytes ? bytes : 0;
}

// Can 4 neighbouring codes be one load or store? K and the rows of every matrix (null: none) must be aligned for it.
bool is_packed(int64_t K, std::initializer_list<const void*> matrices) {
    bool aligned = K % kCodes == 0;
    for (const void* matrix : matrices) aligned &= reinterpret_cast<uintptr_t>(matrix) % alignof(Four) == 0;
    return aligned;
}

// run(std::true_type or std::false_type)
template <class Run>
void with_flag(bool flag, Run run) {
    flag ? run(std::true_type()) : run(std::false_type());
}

// run(a value of the type)
template <class Run>
void with_type(DType dtype, Run run) {
    switch (dtype) {
        case DType::float32: return run(float());
        case DType::float16: return run(__half());
        case DType::bfloat16: return run(__nv_bfloat16());
    }
    throw std::invalid_argument("dtype must be 0, 1 or 2, got " + std::to_string(int32_t(dtype)));
}

// run(a value of the type, is_packed)
template <class Run>
void with_type(DType dtype, bool packed, Run run) {
    with_flag(packed, [&](auto is_packed) { with_type(dtype, [&](auto type) { run(type, is_packed); }); });
}

}  // namespace

void cuda_gumbel_forward(const GumbelForward& a, void* stream) {
    if (!check_sizes(a.x.R, a.x.K)) return;
    const size_t kept = kept_bytes(a.x.K);
    with_type(a.dtype, is_packed(a.x.K, {a.x.logits, a.x.bias, a.weights}), [&](auto type, auto packed) {
        with_flag(kept > 0, [&](auto is_kept) {
            const auto kernel = gumbel_forward_kernel<decltype(type), packed(), is_kept()>;
            launch("launching gumbel_forward_kernel", kernel, a, a.x.R, threads_of(a.x.K), kept, stream);
        });
    });
}

void cuda_gumbel_backward(const GumbelBackward& a, void* stream) {
    if (!check_sizes(a.x.R, a.x.K)) return;
    const size_t kept = kept_bytes(a.x.K);
    const bool all_packed = is_packed(a.x.K, {a.x.logits, a.x.bias, a.grad_weights, a.weights, a.grad_logits});
    with_type(a.dtype, all_packed, [&](auto type, auto packed) {
        with_flag(kept > 0, [&](auto is_kept) {
            const auto kernel = gumbel_backward_kernel<decltype(type), packed(), is_kept()>;
            launch("launching gumbel_backward_kernel", kernel, a, a.x.R, threads_of(a.x.K), kept, stream);
        });
    });
}

void cuda_sample(const SampleRows& a, void* stream) {
    if (!check_sizes(a.x.R, a.x.K)) return;
    with_flag(is_packed(a.x.K, {a.x.logits, a.x.bias}), [&](auto packed) {
        with_flag(a.temperature != nullptr, [&](auto noisy) {
            launch("launching sample_kernel", sample_kernel<packed(), noisy()>, a, a.x.R, threads_of(a.x.K), 0, stream);
        });
    });
}

void cuda_cross_entropy(const CrossEntropyRows& a, void* stream) {
    if (!check_sizes(a.x.R, a.x.K)) return;
    with_type(a.dtype, is_packed(a.x.K, {a.x.logits, a.x.bias, a.grad_logits}), [&](auto type, auto packed) {
        const auto kernel = cross_entropy_kernel<decltype(type), packed()>;
        launch("launching cross_entropy_kernel", kernel, a, a.x.R, threads_of(a.x.K), 0, stream);
    });
}

void cuda_gumbel_softmax(const GumbelSoftmaxRows& a, void* stream) {
    if (!check_sizes(a.R, a.K)) return;
    const size_t kept = kept_bytes(a.K);
    with_type(a.dtype, is_packed(a.K, {a.logits, a.out}), [&](auto type, auto packed) {
        with_flag(kept > 0, [&](auto is_kept) {
            const auto kernel = gumbel_softmax_kernel<decltype(type), packed(), is_kept()>;
            launch("launching gumbel_softmax_kernel", kernel, a, a.R, threads_of(a.K), kept, stream);
        });
    });
}

void cuda_add_columns(const ColumnSums& a, void* stream) {
    if (!check_sizes(a.R, a.K)) return;
    const int64_t blocks = (a.K + kColumns - 1) / kColumns * a.count;
    if (a.count < 1 || blocks > kMaxRows)
        throw std::invalid_argument("count must be at least 1 and not too large, got " + std::to_string(a.count));
    with_type(a.dtype, is_packed(a.K, {a.rows}), [&](auto type, auto packed) {
        launch("launching add_columns_kernel", add_columns_kernel<decltype(type), packed()>, a, blocks, kSumThreads, 0,
               stream);
    });
}

void cuda_sum_totals(const SumOfTotals& a, void* stream) {
    check_sizes(0, a.K);
    with_type(a.dtype, [&](auto type) {
        launch("launching sum_totals_kernel", sum_totals_kernel<decltype(type)>, a,
               (a.K + kMaxThreads - 1) / kMaxThreads, kMaxThreads, 0, stream);
    });
}

void cuda_divide_embeddings(const EmbeddingRows& a, void* stream) {
    if (!check_sizes(a.R, 1)) return;
    with_type(a.dtype, [&](auto type) {
        launch("launching divide_embeddings_kernel", divide_embeddings_kernel<decltype(type)>, a,
               (a.R + kMaxWarps - 1) / kMaxWarps, kMaxThreads, 0, stream);
    });
}

}  // namespace dalle_fast
