// Cuts a decoding step into tasks and runs them on threads.
#include "decode.h"

#include <algorithm>

#include "scratch.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace dalle_fast {
namespace {

constexpr int64_t kSerialWork = 1 << 17;  // multiply-adds of the scores: some 10 microseconds of one core

}  // namespace

void attention_decode(const DecodeKernels& kernels, const DecodeArgs& a, int threads) {
    if (a.B * a.H == 0) return;
    const int64_t heads = a.P * a.H, samples = a.B / a.P;
    if (a.B * a.H * (a.T + a.num_slots) * a.D < kSerialWork) threads = 1;  // waking threads costs more
    // A group of samples reads the text once more: no more groups than threads need, and no group below a block.
    const int64_t blocks = (samples + kBlock - 1) / kBlock;
    const int64_t groups = heads >= threads ? 1 : std::min<int64_t>(blocks, (2 * threads + heads - 1) / heads);
    const int64_t count = heads * groups;
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
    const Scratch scratch(kernels.scratch(a), threads);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads)
#endif
    for (int64_t x = 0; x < count; ++x) {
        const int64_t head = x / groups, group = x % groups;
        const auto first_sample = [&](int64_t g) { return std::min(samples, blocks * g / groups * kBlock); };
        const DecodeTask task{head / a.H, head % a.H, first_sample(group), first_sample(group + 1)};
#if defined(_OPENMP)
        kernels.decode(a, task, scratch.of(omp_get_thread_num()));
#else
        kernels.decode(a, task, scratch.of(0));
#endif
    }
}

}  // namespace dalle_fast
