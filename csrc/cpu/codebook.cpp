// Shares the rows of a chunk between threads.
#include "codebook.h"

#include <algorithm>

#include "scratch.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace dalle_fast {
namespace {

constexpr int64_t kSerialWork = 1 << 14;  // logits: some 20 microseconds of one core
constexpr int64_t kRowsAtOnce = 4;        // that a thread takes

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& a, int64_t R, int64_t K, int threads) {
    if (R == 0) return;
    if (R * K < kSerialWork) threads = 1;  // waking threads costs more
    const int64_t step = std::max<int64_t>(1, std::min(kRowsAtOnce, R / threads)), count = (R + step - 1) / step;
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
    const Scratch scratch(size_t(K) * sizeof(float), threads);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads)
#endif
    for (int64_t x = 0; x < count; ++x) {
#if defined(_OPENMP)
        char* memory = scratch.of(omp_get_thread_num());
#else
        char* memory = scratch.of(0);
#endif
        kernel(a, x * step, std::min(R, (x + 1) * step), reinterpret_cast<float*>(memory));
    }
}

}  // namespace

void gumbel_forward(const CodebookKernels& kernels, const GumbelForward& a, int threads) {
    run(kernels.gumbel_forward, a, a.x.R, a.x.K, threads);
}
void gumbel_backward(const CodebookKernels& kernels, const GumbelBackward& a, int threads) {
    run(kernels.gumbel_backward, a, a.x.R, a.x.K, threads);
}
void sample(const CodebookKernels& kernels, const SampleRows& a, int threads) {
    run(kernels.sample, a, a.x.R, a.x.K, threads);
}
void cross_entropy(const CodebookKernels& kernels, const CrossEntropyRows& a, int threads) {
    run(kernels.cross_entropy, a, a.x.R, a.x.K, threads);
}
void gumbel_softmax(const CodebookKernels& kernels, const GumbelSoftmaxRows& a, int threads) {
    run(kernels.gumbel_softmax, a, a.R, a.K, threads);
}

}  // namespace dalle_fast
