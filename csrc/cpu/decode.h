// One step of decoding on the CPU: what the per-instruction-set kernels and the driver share.
//
// B samples, P prompts, H heads, T text, D head size, C slots of an image cache. Plain structures only, as in
// attention.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace dalle_fast {

struct DecodeArgs {
    int64_t B, P, H, T, D;  // samples p * (B / P) ... of prompt p follow each other
    float scale;
    DType dtype;
    const int32_t* text_lengths;            // (P,) or null
    const int32_t* slots;                   // (num_slots) of the image caches that the query sees
    int64_t num_slots;
    Strided text_key, text_value;           // (P, H, T, D)
    Strided image_key, image_value;         // (B, H, C, D)
    Strided query, out;                     // (B, H, D): stride_s is not used
};

// Some samples of one prompt, one head.
struct DecodeTask {
    int64_t prompt, head, sample_begin, sample_end;
};

struct DecodeKernels {
    size_t (*scratch)(const DecodeArgs&);  // bytes that one thread needs
    void (*decode)(const DecodeArgs&, const DecodeTask&, char* scratch);
};

namespace portable { extern const DecodeKernels decode_kernels; }
namespace avx2 { extern const DecodeKernels decode_kernels; }
namespace avx512 { extern const DecodeKernels decode_kernels; }
namespace avx512_bf16 { extern const DecodeKernels decode_kernels; }
namespace avx512_amx { extern const DecodeKernels decode_kernels; }

// Runs over heads, and over groups of samples where there are few heads. A sample's result depends on nothing else, the
// other samples and `threads` included.
void attention_decode(const DecodeKernels&, const DecodeArgs&, int threads);

}  // namespace dalle_fast
