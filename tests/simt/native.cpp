// The CUDA kernels on the host behind the very bindings of the native module, for dalle_fast/ops/codebook/cuda.py.
#include "../../csrc/bindings.h"

PYBIND11_MODULE(cuda_on_host, m) { dalle_fast::bind_cuda(m); }
