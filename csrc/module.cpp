// The Python module dalle_fast._native: what was built, and what the parts add.
#include <pybind11/stl.h>

#include "bindings.h"
#include "build_config.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = DALLE_FAST_VERSION;
    info["sources"] = DALLE_FAST_SOURCES;
    info["compiler"] = DALLE_FAST_COMPILER;
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    const py::object none = py::none();
#if DALLE_FAST_CUDA
    info["cuda"] = DALLE_FAST_CUDA_VERSION;
    info["cuda_architectures"] = DALLE_FAST_CUDA_ARCHITECTURES;
    info["why_no_cuda"] = none;
#else
    info["cuda"] = none;
    info["cuda_architectures"] = none;
    info["why_no_cuda"] = DALLE_FAST_NO_CUDA_REASON;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.def("instruction_sets", &dalle_fast::instruction_sets,
          "Names of the instruction sets that this build and this CPU have, the plainest one first.");
    m.def("instruction_set", &dalle_fast::instruction_set,
          "The one in use. ValueError where DALLE_FAST_ISA names one that is not available.");
    m.def("build_info", &build_info, "How this module was built; `cuda` is None where `why_no_cuda` says why.");
    dalle_fast::bind_attention(m);
    dalle_fast::bind_decode(m);
    dalle_fast::bind_blocks(m);
    dalle_fast::bind_codebook(m);
    dalle_fast::bind_linear(m);
#if DALLE_FAST_CUDA
    dalle_fast::bind_cuda(m);
#endif
}
