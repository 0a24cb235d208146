// Memory for the threads of one call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace dalle_fast {

// One aligned allocation for all threads, made before they start: an exception must not leave a parallel region.
class Scratch {
public:
    Scratch(size_t bytes_per_thread, int threads) : stride_((bytes_per_thread + 4095) / 4096 * 4096) {
        memory_ = static_cast<char*>(std::aligned_alloc(4096, std::max<size_t>(4096, stride_ * size_t(threads))));
        if (!memory_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* of(int thread) const { return memory_ + stride_ * size_t(thread); }

private:
    size_t stride_;
    char* memory_;
};

}  // namespace dalle_fast
