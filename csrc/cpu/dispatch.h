// Which instruction set the CPU kernels run with: the fastest one that was compiled and that this CPU has, or the one
// that the environment variable DALLE_FAST_ISA names.
#pragma once

#include <string>
#include <vector>

#include "attention.h"
#include "blocks.h"
#include "codebook.h"
#include "decode.h"
#include "linear.h"
#include "product.h"

namespace dalle_fast {

// What this build and this CPU both have, the plainest one first.
std::vector<std::string> instruction_sets();

// The active one, chosen at the first call. Throws std::invalid_argument (Python's ValueError) where DALLE_FAST_ISA
// names one that is not in instruction_sets().
const char* instruction_set();

const AttentionKernels& attention_kernels();
const DecodeKernels& decode_kernels();
const CodebookKernels& codebook_kernels();
const LinearKernels& linear_kernels();
const ProductKernels& product_kernels();
const BlocksKernels& blocks_kernels();

}  // namespace dalle_fast
