// What the attention and the decode kernels share: scratch memory, rows of tensors as floats, transposed panels.
//
// Everything has internal linkage: each instruction set must keep its own copy. D head size, Dp = D rounded up to whole
// panels of 16.
#pragma once

#include "attention.h"
#include "simd.h"
#include "transpose.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr float LOG2E = 1.4426950408889634f;  // exp2 is the cheap one
constexpr float LN2 = 0.6931471805599453f;

// A scale in two factors. The first, exact, is for scores: only a positive scale keeps their order, by which the largest is
// found. The second is for what a score is above or below the largest: its own product would be rounded, by whole units where
// scores are large. So lse is the largest times the second, plus the logarithm of the sum, rounded once.
struct ScoreScale {
    float sign, size;  // -1, 0 or 1; above 0
    explicit ScoreScale(float scale) : sign(scale > 0 ? 1 : scale < 0 ? -1 : 0), size(scale == 0 ? 1 : scale * sign) {}
};

DF_INLINE float minus_infinity() { return -__builtin_inff(); }

// Cuts one thread's scratch memory into aligned arrays; with a null base it only counts.
struct Arena {
    char* base;
    size_t used;
    template <class T>
    T* take(size_t count) {
        T* p = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

DF_INLINE int64_t padded(int64_t D) { return (D + kPanel - 1) / kPanel * kPanel; }

template <class T>
DF_INLINE T* row_of(const Strided& x, int64_t b, int64_t h, int64_t s) {
    return reinterpret_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h + s * x.stride_s;
}

// One row of D elements as Dp floats, zeros at the end.
template <class T>
DF_INLINE void load_row(const T* p, int64_t stride, int64_t D, int64_t Dp, float* out) {
    int64_t d = 0;
    if (stride == 1)
        for (; d + VW <= D; d += VW) store(out + d, load_as_float(p + d));
    for (; d < D; ++d) out[d] = to_float(p[d * stride]);
    for (; d < Dp; ++d) out[d] = 0;
}

// Begins to fetch a row that is used a little later: a head's tensors do not fit the second-level cache together.
template <class T>
DF_INLINE void prefetch_row(const T* p, int64_t stride, int64_t D) {
    if (stride != 1) return;
    for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + d);
}
template <class T>
DF_INLINE void prefetch_row_for_write(const T* p, int64_t stride, int64_t D) {
    if (stride != 1) return;
    for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) prefetch_for_write(p + d);
}

template <class T>
DF_INLINE void store_row(const float* x, float scale, T* p, int64_t stride, int64_t D) {
    int64_t d = 0;
    if (stride == 1)
        for (; d + VW <= D; d += VW) store_from_float(p + d, load(x + d) * scale);
    for (; d < D; ++d) from_float(x[d] * scale, p + d * stride);
}

// A panel's rows (16, Dp) -> (Dp, 16)
DF_INLINE void transpose_panel(const float* rows, int64_t Dp, float* out) {
    for (int64_t d = 0; d < Dp; d += 16) {
        Words words[16];
#pragma GCC unroll 16
        for (int x = 0; x < 16; ++x) words[x] = *reinterpret_cast<const UnalignedWords*>(rows + x * Dp + d);
        transpose(words);
#pragma GCC unroll 16
        for (int x = 0; x < 16; ++x) *reinterpret_cast<UnalignedWords*>(out + (d + x) * 16) = words[x];
    }
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
