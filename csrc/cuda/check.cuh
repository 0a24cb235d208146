// Every return code of the CUDA runtime goes through check_cuda.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dalle_fast {

inline void check_cuda(cudaError_t code, const char* what) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // so that it is not reported a second time, to whoever asks next
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code));
}

}  // namespace dalle_fast
