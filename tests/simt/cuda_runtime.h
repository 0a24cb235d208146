// As much of CUDA as csrc/cuda/*.cu needs to be compiled for the host by an ordinary C++ compiler: threads run one after
// another. Kernels that synchronise threads are beyond it.
#pragma once

#include <cstddef>

#define __global__ static

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <class A, class B, class C>
cudaError_t cudaLaunchKernel(void (*kernel)(A, B, C), dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
    if (!grid.x || block.x > 1024) return cudaErrorInvalidConfiguration;
    gridDim = grid;
    blockDim = block;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x)
            kernel(*static_cast<A*>(args[0]), *static_cast<B*>(args[1]), *static_cast<C*>(args[2]));
    return cudaSuccess;
}
