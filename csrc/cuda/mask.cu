// The mask rule evaluated on the device. Attention on a GPU is Triton's; this shows that the rule's C++ text means there
// what it means on the host (tests/test_masks_cuda.py).
#include <algorithm>

#include "check.cuh"
#include "kernels.h"

namespace dalle_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;  // beyond it the threads loop

__global__ void dense_mask_kernel(Mask mask, int32_t seq_len, bool* out) {
    const int64_t pairs = int64_t(seq_len) * seq_len, step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t x = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; x < pairs; x += step)
        out[x] = allows(mask, int32_t(x / seq_len), int32_t(x % seq_len));
}

}  // namespace

void cuda_dense_mask(const Mask& mask, int32_t seq_len, bool* out, void* stream) {
    const int64_t pairs = int64_t(seq_len) * seq_len;
    if (pairs == 0) return;
    const int64_t blocks = std::min((pairs + kThreads - 1) / kThreads, kMaxBlocks);
    // A function call rather than <<<>>>: its own return code, and tests/simt can compile it for the host.
    Mask rule = mask;
    void* args[] = {&rule, &seq_len, &out};
    check_cuda(cudaLaunchKernel(dense_mask_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), args, 0,
                                static_cast<cudaStream_t>(stream)),
               "launching dense_mask_kernel");
}

}  // namespace dalle_fast
