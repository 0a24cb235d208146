// What stands between the products of a transformer's block, for one sample. Compiled once per instruction set.
#include "blocks.h"

#include <cmath>

#include "rows.h"
#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

typedef double Doubles __attribute__((vector_size(VW * 8)));

template <class T>
void normalize(const AddNormArgs& a, const float* x, float* out) {
    const T *weight = static_cast<const T*>(a.weights.weight), *bias = static_cast<const T*>(a.weights.bias);
    // The row stays in the first-level cache. A mean of squares less the mean's square would cancel.
    const int64_t whole = a.W / VW * VW;
    const auto mean_of = [&](auto f) DF_INLINE_LAMBDA {
        Doubles sums = {};  // so that one large number does not swallow the others
        for (int64_t k = 0; k < whole; k += VW) sums += __builtin_convertvector(f(load(x + k)), Doubles);
        double sum = 0;
        for (int k = 0; k < VW; ++k) sum += sums[k];
        for (int64_t k = whole; k < a.W; ++k) sum += f(x[k]);
        return float(sum / double(a.W));
    };
    const float mean = mean_of([](auto v) DF_INLINE_LAMBDA { return v; });
    const float variance = mean_of([&](auto v) DF_INLINE_LAMBDA { return (v - mean) * (v - mean); });
    // What does not fit a float has no norm, and not one of 0.
    const float factor = variance < __builtin_inff() ? 1 / std::sqrt(variance + a.weights.eps) : __builtin_nanf("");
    for (int64_t k = 0; k < whole; k += VW)
        store(out + k, (load(x + k) - mean) * factor * load_as_float(weight + k) + load_as_float(bias + k));
    for (int64_t k = whole; k < a.W; ++k) out[k] = (x[k] - mean) * factor * to_float(weight[k]) + to_float(bias[k]);
}

void add_norm(const AddNormArgs& a, int64_t row) {
    float* x = a.x + row * a.W;
    if (a.update)
        for (int64_t k = 0; k < a.W; ++k) x[k] += a.update[row * a.W + k];
    with_type(a.dtype, [&](auto zero) { normalize<decltype(zero)>(a, x, a.out + row * a.W); });
}

void store_heads(DType dtype, const float* heads, int64_t H, int64_t D, const Strided& to, int64_t sample, int64_t slot) {
    with_type(dtype, [&](auto zero) {
        typedef decltype(zero) T;
        for (int64_t h = 0; h < H; ++h) store_row(heads + h * D, 1, row_of<T>(to, sample, h, slot), to.stride_d, D);
    });
}

void load_heads(DType dtype, const Strided& from, int64_t sample, int64_t slot, int64_t H, int64_t D, float* heads) {
    with_type(dtype, [&](auto zero) {
        typedef decltype(zero) T;
        for (int64_t h = 0; h < H; ++h)
            load_row(row_of<const T>(from, sample, h, slot), from.stride_d, D, D, heads + h * D);
    });
}

}  // namespace

extern const BlocksKernels blocks_kernels;
const BlocksKernels blocks_kernels = {add_norm, store_heads, load_heads};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
