// Tasks shared between threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "scratch.h"

#if defined(DALLE_FAST_STD_THREADS)  // for the thread sanitizer, which does not see OpenMP's barriers
#include <atomic>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace dalle_fast {

// Calls task(x, scratch) for 0 <= x < count, on at most `threads` threads, each with memory of its own.
template <class Task>
void for_each(int64_t count, int threads, size_t scratch_bytes, Task&& task) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
    const Scratch scratch(scratch_bytes, threads);
#if defined(DALLE_FAST_STD_THREADS)
    std::atomic<int64_t> next{0};
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread)
        pool.emplace_back([&, thread] {
            for (int64_t x; (x = next++) < count;) task(x, scratch.of(thread));
        });
    for (std::thread& thread : pool) thread.join();
#else
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads)
#endif
    for (int64_t x = 0; x < count; ++x) {
#if defined(_OPENMP)
        task(x, scratch.of(omp_get_thread_num()));
#else
        task(x, scratch.of(0));
#endif
    }
#endif
}

}  // namespace dalle_fast
