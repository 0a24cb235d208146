// The CUDA kernels as Python sees them: device addresses and a stream in, nothing out.
#include <pybind11/stl.h>

#include <array>

#include "../bindings.h"
#include "kernels.h"

namespace py = pybind11;

namespace dalle_fast {

void bind_cuda_codebook(py::module_& m);         // codebook_binding.cpp
void bind_cuda_codebook_chunks(py::module_& m);  // codebook_chunks_binding.cpp

void bind_cuda(py::module_& m) {
    m.def(
        "cuda_versions",
        [] {
            const CudaVersions versions = cuda_versions();
            return std::array<int, 2>{versions.driver, versions.runtime};
        },
        "CUDA versions, 1000 * major + 10 * minor: the newest one that the driver serves, 0 without one, and this module's.");
    bind_cuda_codebook(m);
    bind_cuda_codebook_chunks(m);
}

}  // namespace dalle_fast
