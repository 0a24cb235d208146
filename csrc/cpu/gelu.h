// GELU, x * Phi(x) with the normal distribution's Phi, of vectors. Everything has internal linkage, as in simd.h.
#pragma once

#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// max(x, 0) - a Phi(-a) with a = |x|, where Phi(-a) = exp(-a^2 / 2) (t c1 + t^2 c2 + ... + t^8 c8), t = 1 / (1 + 0.23 a).
// The coefficients minimise the largest relative error for a to 13, 1.4e-7; so both tails keep their digits, where
// 1 + erf would cancel. From 11.8 on the exponential is 0. NaN stays NaN, and -infinity gives 0, its limit.
DF_INLINE Vec gelu(Vec x) {
    const Vec a = min(max(x, -x), splat(15.f));
    const Vec t = 1.f / (1.f + 0.23f * a);
    Vec p = splat(-7.388325110e-2f);
    p = p * t + 2.688529861e-1f;
    p = p * t - 2.349914806e-1f;
    p = p * t + 2.536042833e-1f;
    p = p * t - 7.368517164e-4f;
    p = p * t + 1.061048307e-1f;
    p = p * t + 8.914178153e-2f;
    p = p * t + 9.190776886e-2f;
    return max(x, Vec{}) - a * (exp2(-0.7213475204444817f * a * a) * (p * t));
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
