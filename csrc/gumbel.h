// Gumbel noise from 32 random bits: g = -log(-log1p(-u)), finite for every word, correct to a few units in the last
// place. One text for scalars on host and device and for vectors on the CPU.
//
// u is the same number everywhere. In the rest the compiler may fuse products with sums, and a GPU has its own logarithms:
// implementations differ in the last places.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace dalle_fast {

// What the text below needs of a lane type: its floats, signed and unsigned integers with their arithmetic, and how they
// become each other.
struct ScalarLanes {
    typedef float Float;
    typedef int32_t Int;
    typedef uint32_t Word;
    DALLE_FAST_INLINE float from_word(uint32_t x) { return float(x); }
    DALLE_FAST_INLINE float from_int(int32_t x) { return float(x); }
    DALLE_FAST_INLINE float smaller(float a, float b) { return a < b ? a : b; }
    DALLE_FAST_INLINE float where_zero(int32_t x, float a, float b) { return x == 0 ? a : b; }
    DALLE_FAST_INLINE int32_t bits_of(float x) {
        int32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }
    DALLE_FAST_INLINE float of_bits(int32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
};

// A positive normal number is 2^(exponent / 2^23) * (1 + fraction), with 1 + fraction from sqrt(1/2) to sqrt(2): the
// exponent stays where it is in the number's bits.
template <class Lanes>
struct Split {
    typename Lanes::Int exponent;
    typename Lanes::Float fraction;
};

template <class Lanes>
DALLE_FAST_INLINE Split<Lanes> split(typename Lanes::Float x) {
    const typename Lanes::Int bits = Lanes::bits_of(x), exponent = (bits - 0x3f3504f3) & ~0x7fffff;  // sqrt(1/2)
    return {exponent, Lanes::of_bits(bits - exponent) - 1.0f};
}

// log(1 + f) = f - f^2 / 2 + f^3 P(f), P of degree 8 with the coefficients of Cephes' logf, and the exponent times ln 2,
// which is added in two parts, the larger of them exact.
template <class Lanes>
DALLE_FAST_INLINE typename Lanes::Float log_of(const Split<Lanes>& x) {
    typedef typename Lanes::Float Float;
    const Float f = x.fraction, exponent = Lanes::from_int(x.exponent);
    Float p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float larger = 0.693359375f * 0x1p-23f, smaller = -2.12194440e-4f * 0x1p-23f;
    return exponent * larger + (f + (exponent * smaller + (p * f - 0.5f) * (f * f)));
}

// A GPU has a logarithm of its own. PTX promises of lg2.approx an absolute error of 2^-22 for x from 1/2 to 2 and a relative
// one of 2^-22 outside. Were it always as wrong as that, noise would be within 5.6 units of 2^-23 max(1, |noise|), were it
// exact within 1.6 (emulated on a CPU for 12 million words). The product is rounded before anything is added to it: a
// word's noise is the same in all kernels, whatever the compiler would fuse.
#if defined(__CUDA_ARCH__)
DALLE_FAST_INLINE float log_of_gpu(float x) {
    float log2;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(x));
    return __fmul_rn(log2, 0.693147181f);
}
#endif

// log(1 - u) of u from 2^-33 to 1 - 2^-24, correct to its last places however small it is: its logarithm comes next, which
// makes an absolute error of a relative one.
template <class Lanes>
DALLE_FAST_INLINE typename Lanes::Float log_of_rest(typename Lanes::Float u) {
#if defined(__CUDA_ARCH__)
    // -u + u^2 P(u) up to 1/2, P of degree 7 for the least relative error, 2^-25.
    float p = -1.41454756f * u + 1.63958895f;
    p = p * u - 1.20871317f;
    p = p * u + 0.180951878f;
    p = p * u - 0.263690829f;
    p = p * u - 0.243682623f;
    p = p * u - 0.333632112f;
    p = p * u - 0.499995232f;
    const float of_small = p * (u * u) - u, of_large = log_of_gpu(1.0f - u);
    return u <= 0.5f ? of_small : of_large;
#else
    Split<Lanes> parts = split<Lanes>(1.0f - u);
    // For small u the difference has lost digits of u, but there the fraction is -u.
    parts.fraction = Lanes::where_zero(parts.exponent, -u, parts.fraction);
    return log_of<Lanes>(parts);
#endif
}

// log(x) of a positive normal number, where an absolute error is enough as long as the logarithm is not large.
template <class Lanes>
DALLE_FAST_INLINE typename Lanes::Float coarse_log(typename Lanes::Float x) {
#if defined(__CUDA_ARCH__)
    return log_of_gpu(x);
#else
    return log_of<Lanes>(split<Lanes>(x));
#endif
}

template <class Lanes>
DALLE_FAST_INLINE typename Lanes::Float gumbel_noise(typename Lanes::Word word) {
    typedef typename Lanes::Float Float;
    // The middle of the word's interval, so never 0. The largest ones would be rounded to 1.
    const Float middle = Lanes::from_word(word) * 0x1p-32f + 0x1p-33f, u = Lanes::smaller(middle, Float() + (1.0f - 0x1p-24f));
    return -coarse_log<Lanes>(-log_of_rest<Lanes>(u));  // of 2^-33 to 17, so finite
}

}  // namespace dalle_fast
