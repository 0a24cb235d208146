#include "../../csrc/cuda/mask.cu"

extern "C" void dense_mask_on_host(const int* numbers, int seq_len, bool* out) {
    const int* n = numbers;
    dalle_fast::cuda_dense_mask({static_cast<dalle_fast::Rule>(n[0]), n[1], n[2], n[3], n[4], n[5]}, seq_len, out, nullptr);
}
