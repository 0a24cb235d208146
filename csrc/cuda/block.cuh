// Threads of a block: sums and maxima over them, and shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

// Shared memory whose size the launch gives. tests/simt has its own.
#if !defined(DALLE_FAST_DYNAMIC_SHARED)
#define DALLE_FAST_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace dalle_fast {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// x of the lane whose number differs in the bits of `bits`. T consists of 4-byte words.
template <class T>
__device__ T exchange(const T& x, int bits) {
    static_assert(sizeof(T) % 4 == 0, "shuffles move words");
    int words[sizeof(T) / 4];
    memcpy(words, &x, sizeof(T));
    for (int& word : words) word = __shfl_xor_sync(kAllLanes, word, bits);
    T other;
    memcpy(&other, words, sizeof(T));
    return other;
}

// x of all threads of a warp under `combine`, in every one of them. `combine` must be commutative to the last bit, so
// that all lanes agree; the order is the same in every run.
template <class T, class Combine>
__device__ T warp_reduce(T x, Combine combine) {
    for (int bits = kWarp / 2; bits > 0; bits /= 2) x = combine(x, exchange(x, bits));
    return x;
}

// The same for a block of whole warps. `scratch` is shared memory of one T a warp, which no other reduction of the
// kernel may use: then one barrier suffices.
template <class T, class Combine>
__device__ T block_reduce(T x, T* scratch, Combine combine) {
    x = warp_reduce(x, combine);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = scratch[0];
    for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) x = combine(x, scratch[warp]);
    return x;
}

}  // namespace
}  // namespace dalle_fast
