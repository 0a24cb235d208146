// What each part adds to the Python module; called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace dalle_fast {

void bind_attention(pybind11::module_& m);  // cpu/attention_binding.cpp
void bind_decode(pybind11::module_& m);     // cpu/decode_binding.cpp
void bind_blocks(pybind11::module_& m);     // cpu/blocks_binding.cpp
void bind_codebook(pybind11::module_& m);   // cpu/codebook_binding.cpp
void bind_linear(pybind11::module_& m);     // cpu/linear_binding.cpp
void bind_cuda(pybind11::module_& m);       // cuda/binding.cpp, only in builds with CUDA

}  // namespace dalle_fast
