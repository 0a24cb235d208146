// The streaming kernels of the codebook on the host. The first number of a request is the function.
#include "../../csrc/cuda/codebook_streaming.cu"
#include "mma.h"
#include "serve.h"

using namespace dalle_fast;
using serve::buffer;
using serve::number;

namespace {

void call() {
    const bool loss = number() != 0;
    StreamingRows a{};
    a.N = number();
    a.K = number();
    a.I = number();
    a.dtype = CodebookDType(number());
    a.hidden = buffer<void>();
    a.weight = buffer<void>();
    a.bias = buffer<float>();
    if (loss) {
        a.ignore_index = number();
        a.target = buffer<int64_t>();
        a.loss = buffer<float>();
        return cuda_codebook_cross_entropy_streaming(a, nullptr);
    }
    a.noise.seed_per_row = number() != 0;
    a.noise.first_row = number();
    a.noise.seed = buffer<int64_t>();
    a.temperature = buffer<float>();
    a.codes = buffer<int64_t>();
    cuda_codebook_sample_streaming(a, nullptr);
}

}  // namespace

int main() { serve::requests(call); }
