// Tasks shared between threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "scratch.h"

#if defined(DALLE_FAST_STD_THREADS)  // for the thread sanitizer, which does not see OpenMP's barriers
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace dalle_fast {

// Calls work(thread, scratch) on at most `threads` threads, each with memory of its own.
template <class Work>
void on_threads(int threads, size_t scratch_bytes, Work&& work) {
    const Scratch scratch(scratch_bytes, threads);
#if defined(DALLE_FAST_STD_THREADS)
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread)
        pool.emplace_back([&, thread] { work(thread, scratch.of(thread)); });
    for (std::thread& thread : pool) thread.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), scratch.of(omp_get_thread_num()));
#else
    work(0, scratch.of(0));
#endif
}

// Calls task(x, scratch) for 0 <= x < count.
template <class Task>
void for_each(int64_t count, int threads, size_t scratch_bytes, Task&& task) {
    std::atomic<int64_t> next{0};
    on_threads(int(std::max<int64_t>(1, std::min<int64_t>(threads, count))), scratch_bytes, [&](int, char* scratch) {
        for (int64_t x; (x = next++) < count;) task(x, scratch);
    });
}

}  // namespace dalle_fast
