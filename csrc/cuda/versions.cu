// Which CUDA is here: a driver serves runtimes of its own major version and of older ones.
#include "check.cuh"
#include "kernels.h"

namespace dalle_fast {

CudaVersions cuda_versions() {
    CudaVersions versions{};
    check_cuda(cudaDriverGetVersion(&versions.driver), "asking for the driver's version");
    check_cuda(cudaRuntimeGetVersion(&versions.runtime), "asking for the runtime's version");
    return versions;
}

}  // namespace dalle_fast
