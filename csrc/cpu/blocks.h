// One token of each sample through a transformer's blocks in one call: norm, packed projection, its keys and values into
// the caches, attention, projection, norm, perceptron, for one block after another, and a last norm.
//
// R samples, W width, H heads, D head size, F width of the perceptron. Plain structures only, as in attention.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "decode.h"
#include "linear.h"

namespace dalle_fast {

struct NormWeights {
    const void *weight, *bias;  // (W), contiguous
    float eps;
};

struct LinearWeights {
    const void *weight, *bias;  // (N, K) and (N), contiguous
};

struct Block {
    NormWeights attention_norm, mlp_norm;
    LinearWeights qkv, out, up, down;
    Strided text_key, text_value, image_key, image_value;  // as in DecodeArgs
    int64_t slot;                                          // of the image caches, where the token goes
    const int32_t* slots;                                  // that it sees
    int64_t num_slots;
};

struct BlocksArgs {
    int64_t R, P, W, H, D, T, F;  // P, T: as in DecodeArgs
    DType dtype;                  // of weights and caches
    float scale;
    const int32_t* text_lengths;  // (P,) or null
    const Block* blocks;
    int64_t num_blocks;
    NormWeights norm;
    const float* x;               // (R, W), contiguous, as out
    float* out;
};

struct AddNormArgs {
    int64_t W;
    DType dtype;          // of the weights
    NormWeights weights;
    float* x;             // (R, W), to which update is added
    const float* update;  // (R, W) or null
    float* out;           // (R, W): layer norm of the sum
};

struct BlocksKernels {
    void (*add_norm)(const AddNormArgs&, int64_t row);
    // One sample's heads, H x D floats, to or from row `slot` of each head of a (B, H, S, D) tensor.
    void (*store_heads)(DType, const float* heads, int64_t H, int64_t D, const Strided& to, int64_t sample, int64_t slot);
    void (*load_heads)(DType, const Strided& from, int64_t sample, int64_t slot, int64_t H, int64_t D, float* heads);
};

namespace portable { extern const BlocksKernels blocks_kernels; }
namespace avx2 { extern const BlocksKernels blocks_kernels; }
namespace avx512 { extern const BlocksKernels blocks_kernels; }
namespace avx512_bf16 { extern const BlocksKernels blocks_kernels; }
namespace avx512_amx { extern const BlocksKernels blocks_kernels; }

// All between the first norm and the last is float32, but for what goes into the caches, the attention's operands and, where
// the matrix unit multiplies bfloat16, the linear layers' x.
// A sample's result depends on nothing else, the other samples and `threads` included.
void blocks_step(const BlocksKernels&, const LinearKernels&, const DecodeKernels&, const BlocksArgs&, int threads);

}  // namespace dalle_fast
