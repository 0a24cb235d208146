// The CUDA kernels as Python sees them: device addresses and a stream in, nothing out.
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "../bindings.h"
#include "kernels.h"

namespace py = pybind11;

namespace dalle_fast {

void bind_cuda_codebook(py::module_& m);         // codebook_binding.cpp
void bind_cuda_codebook_chunks(py::module_& m);  // codebook_chunks_binding.cpp

void bind_cuda(py::module_& m) {
    m.def(
        "cuda_dense_mask",
        [](const std::array<int32_t, 6>& n, int32_t seq_len, int64_t out, int64_t stream) {
            if (seq_len < 0) throw std::invalid_argument("seq_len must be at least 0, got " + std::to_string(seq_len));
            const Mask mask{static_cast<Rule>(n[0]), n[1], n[2], n[3], n[4], n[5]};
            cuda_dense_mask(mask, seq_len, reinterpret_cast<bool*>(out), reinterpret_cast<void*>(stream));
        },
        py::arg("mask"), py::arg("seq_len"), py::arg("out"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Evaluate a mask (AttentionMask.encode()) for its first seq_len positions into a (seq_len, seq_len) bool tensor\n"
        "of the current device, given by its address, in the stream given by its handle.");
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
