// Shares the columns of a linear layer of few rows between threads.
#include "linear.h"

#include <algorithm>

#include "parallel.h"

namespace dalle_fast {
namespace {

constexpr int64_t kSerialWork = 1 << 16;   // weights: some 10 microseconds of one core
constexpr int64_t kPartsOfThread = 4;      // so that a late thread does not make the others wait for half of the work
constexpr int64_t kTiles = 48;             // columns: whole tiles of 3, 4 and 16

}  // namespace

void linear(const LinearKernels& kernels, const LinearArgs& given, int threads) {
    LinearArgs a = given;
    const Scratch packed(kernels.packed_bytes(a), 1);
    a.packed = packed.of(0);
    kernels.pack(a, packed.of(0));
    if (a.N * a.K < kSerialWork) threads = 1;
    const int64_t parts = threads == 1 ? 1 : kPartsOfThread * threads;
    const int64_t step = std::max<int64_t>(1, (a.N + parts * kTiles - 1) / (parts * kTiles)) * kTiles;
    for_each((a.N + step - 1) / step, threads, 0, [&](int64_t x, void*) {
        kernels.columns(a, x * step, std::min(a.N, (x + 1) * step));
    });
}

}  // namespace dalle_fast
